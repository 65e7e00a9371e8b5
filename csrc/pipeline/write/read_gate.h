// Lets threads read payloads where they lie, and one stop them all while it does what may move that memory.
//
// Any thread may use it. While it reads, a reader must not wait for anything but the file and other readers.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <mutex>

#include "pipeline/write/record_checksums.h"

namespace sdio {

class ReadGate {
 public:
  // Reading and closed() do nothing where the gate is null, because nothing moves that memory.
  class Reading {
   public:
    explicit Reading(ReadGate* gate) : gate_(gate) {
      if (gate_ != nullptr) gate_->enter();
    }
    ~Reading() {
      if (gate_ != nullptr) gate_->leave();
    }
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;

   private:
    ReadGate* const gate_;
  };

  // Calls `function` while nobody reads; in the thread that watches the readers, which is not one itself. The gate
  // stays closed where `function` throws.
  template <typename Function>
  static void closed(ReadGate* gate, const Function& function) {
    if (gate != nullptr) gate->close();
    function();
    if (gate != nullptr) gate->open();
  }

  // From now on readers get the exception Cancelled, those that wait too.
  void cancel() {
    const std::lock_guard<std::mutex> lock(mutex_);
    cancelled_ = true;
    changed_.notify_all();
  }

 private:
  void enter() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !closed_ || cancelled_; });
    if (cancelled_) throw Cancelled();
    ++num_readers_;
  }

  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--num_readers_ == 0 && closed_) changed_.notify_all();
  }

  void close() {
    std::unique_lock<std::mutex> lock(mutex_);
    closed_ = true;
    changed_.wait(lock, [this] { return num_readers_ == 0; });
  }

  void open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = false;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  size_t num_readers_ = 0;
  bool closed_ = false;
  bool cancelled_ = false;
};

}  // namespace sdio
