#include "pipeline/threads/worker_threads.h"

#include <pthread.h>
#include <signal.h>

#include <cstdint>
#include <thread>
#include <vector>

#include "pipeline/memory/address_space.h"
#include "pipeline/threads/profiled_step.h"

namespace sdio {
namespace {

// A thread's stack, and the heap of its own that glibc's malloc reserves for it.
constexpr uint64_t kThreadNbytes = (8u << 20) + (64u << 20);
constexpr auto kWatchInterval = std::chrono::milliseconds(50);

// Signals are for the threads that the interpreter knows.
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

// Held while threads are started, and during every fork(). glibc starts a thread on the stack of one that has ended,
// and first frees what that had allocated; a process that is forked at that moment frees it once more when it starts a
// thread itself.
std::mutex* starting = nullptr;

std::mutex& lock_of_starting() {
  static const bool is_ready = [] {
    starting = new std::mutex;
    pthread_atfork([] { starting->lock(); }, [] { starting->unlock(); }, [] { starting->unlock(); });
    return true;
  }();
  static_cast<void>(is_ready);
  return *starting;
}

}  // namespace

void WorkerThreads::run(size_t num_threads, const std::function<void()>& work, const std::function<void()>& watch) {
  std::vector<std::thread> threads;
  num_threads = affordable(num_threads, kThreadNbytes, 0);
  try {
    threads.reserve(num_threads);
    const auto recorded_work = [&work, record = recording_for_another_thread()] {
      record();
      work();
    };
    const std::lock_guard<std::mutex> no_fork(lock_of_starting());
    const AllSignalsBlocked in_workers;
    for (size_t i = 0; i < num_threads; ++i) {
      threads.emplace_back([this, recorded_work] {
        guarded(recorded_work);
        std::lock_guard<std::mutex> lock(mutex_);
        ++num_finished_;
        finished_.notify_one();
      });
    }
  } catch (const std::exception&) {  // no more threads can be started: those that run do all the work
  }
  if (threads.empty()) {
    watch_in_work_ = &watch;
    last_watch_ = Clock::now();
    guarded(work);
  }
  std::unique_lock<std::mutex> lock(mutex_);
  while (!finished_.wait_for(lock, kWatchInterval, [&] { return num_finished_ == threads.size(); })) {
    lock.unlock();
    if (!cancelled_) guarded(watch);
    lock.lock();
  }
  lock.unlock();
  for (std::thread& thread : threads) thread.join();
  if (error_) std::rethrow_exception(error_);
}

bool WorkerThreads::go_on() {
  if (watch_in_work_ != nullptr && Clock::now() - last_watch_ >= kWatchInterval) {
    (*watch_in_work_)();
    last_watch_ = Clock::now();
  }
  return !cancelled_;
}

void WorkerThreads::guarded(const std::function<void()>& function) {
  try {
    function();
  } catch (...) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();  // later ones are consequences of the first
    }
    cancelled_ = true;
    on_cancel_();
  }
}

}  // namespace sdio
