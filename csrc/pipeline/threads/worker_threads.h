// Several threads that share one piece of work, watched by the thread that called.
//
// A WorkerThreads serves one run(). go_on() is asked by the work, in whichever threads that runs.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>

namespace sdio {

// Called now and then in the thread that called the pipeline: it reports progress, and throws to cancel.
using Watcher = std::function<void(uint64_t bytes_done)>;

class WorkerThreads {
 public:
  // `on_cancel` is called, in any thread, when a worker or the watch has thrown.
  explicit WorkerThreads(std::function<void()> on_cancel = [] {}) : on_cancel_(std::move(on_cancel)) {}

  // Runs `work` in each of `num_threads` threads, which have all signals blocked, and `watch` in this one every 50 ms.
  // With 0 threads, or where no more are to be had or to be afforded, both run in this one. Returns when every thread
  // has; throws what was thrown first.
  void run(size_t num_threads, const std::function<void()>& work, const std::function<void()>& watch);

  // Asked between pieces of work: whether to begin the next one. Throws what `watch` throws, where the caller does the
  // work.
  bool go_on();

 private:
  using Clock = std::chrono::steady_clock;

  void guarded(const std::function<void()>& function);

  const std::function<void()> on_cancel_;
  std::atomic<bool> cancelled_{false};
  const std::function<void()>* watch_in_work_ = nullptr;  // where the caller does the work
  Clock::time_point last_watch_;
  std::mutex mutex_;
  std::condition_variable finished_;
  size_t num_finished_ = 0;
  std::exception_ptr error_;
};

}  // namespace sdio
