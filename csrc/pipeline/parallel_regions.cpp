#include "pipeline/parallel_regions.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace sdio {
namespace {

// Below this, starting threads costs more than it saves.
constexpr uint64_t kThreadsFromNbytes = 4u << 20;
constexpr auto kWatchInterval = std::chrono::milliseconds(50);

// Signals stay with the threads that the interpreter knows.
class AllSignalsBlocked {
 public:
  AllSignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous_);
  }
  ~AllSignalsBlocked() { pthread_sigmask(SIG_SETMASK, &previous_, nullptr); }

 private:
  sigset_t previous_;
};

class Team {
 public:
  Team(const Regions& regions, const std::function<std::unique_ptr<RegionWorker>()>& start_worker,
       const std::function<void()>& cancel)
      : regions_(regions), start_worker_(start_worker), cancel_(cancel) {}

  void run(size_t num_threads, const Watcher& watch) {
    num_threads = static_cast<size_t>(std::min<uint64_t>(num_threads, regions_.count()));
    if (num_threads > 1 || regions_.nbytes >= kThreadsFromNbytes) {
      run_threads(num_threads, watch);
    } else {
      work();
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void run_threads(size_t num_threads, const Watcher& watch) {
    std::vector<std::thread> threads;
    try {
      const AllSignalsBlocked in_workers;
      for (size_t i = 0; i < num_threads; ++i) {
        threads.emplace_back([this] {
          work();
          std::lock_guard<std::mutex> lock(mutex_);
          ++num_finished_;
          finished_.notify_one();
        });
      }
    } catch (const std::system_error&) {  // no more threads to be had: those that started do all the work
      if (threads.empty()) work();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    while (!finished_.wait_for(lock, kWatchInterval, [&] { return num_finished_ == threads.size(); })) {
      lock.unlock();
      try {
        if (!cancelled_) watch(bytes_done_);
      } catch (...) {
        fail(std::current_exception());
      }
      lock.lock();
    }
    lock.unlock();
    for (std::thread& thread : threads) thread.join();
  }

  void work() {
    try {
      const std::unique_ptr<RegionWorker> worker = start_worker_();
      for (uint64_t region = next_region_++; region < regions_.count() && !cancelled_; region = next_region_++) {
        const uint64_t begin = region * regions_.region_nbytes;
        const uint64_t nbytes = std::min(regions_.region_nbytes, regions_.nbytes - begin);
        worker->work(begin, nbytes);
        bytes_done_ += nbytes;
      }
    } catch (...) {
      fail(std::current_exception());
    }
  }

  void fail(std::exception_ptr error) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = error;  // those after it are its echoes
    }
    cancelled_ = true;
    cancel_();
  }

  const Regions regions_;
  const std::function<std::unique_ptr<RegionWorker>()>& start_worker_;
  const std::function<void()>& cancel_;
  std::atomic<uint64_t> next_region_{0};
  std::atomic<uint64_t> bytes_done_{0};
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  std::condition_variable finished_;
  size_t num_finished_ = 0;
  std::exception_ptr error_;
};

}  // namespace

void for_each_region(const Regions& regions, size_t num_threads,
                     const std::function<std::unique_ptr<RegionWorker>()>& start_worker,
                     const std::function<void()>& cancel, const Watcher& watch) {
  Team(regions, start_worker, cancel).run(num_threads, watch);
}

}  // namespace sdio
