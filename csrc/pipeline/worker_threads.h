// Several threads that share one piece of work, watched by the thread that called.
//
// A WorkerThreads serves one run(). cancelled() may be asked from any thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>

namespace sdio {

// Called in the thread that called the pipeline, now and then while the workers run: reports progress, and throws to
// cancel.
using Watcher = std::function<void(uint64_t bytes_done)>;

class WorkerThreads {
 public:
  // `on_cancel` is called, in any thread, when a worker or the watch has thrown.
  explicit WorkerThreads(std::function<void()> on_cancel = [] {}) : on_cancel_(std::move(on_cancel)) {}

  // Runs `work` in each of `num_threads` threads, which have all signals blocked, and `watch` in this one every 50 ms.
  // With 0 threads `work` runs in this one, unwatched. Returns when every thread has; throws what was thrown first.
  // `work` looks at cancelled() between its pieces.
  void run(size_t num_threads, const std::function<void()>& work, const std::function<void()>& watch);

  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }

 private:
  void guarded(const std::function<void()>& function);

  const std::function<void()> on_cancel_;
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  std::condition_variable finished_;
  size_t num_finished_ = 0;
  std::exception_ptr error_;
};

}  // namespace sdio
