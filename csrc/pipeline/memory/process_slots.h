// The pools of slots that a process shares, for one kind of memory: for regions on their way into or out of a file, and
// for snapshots, whose pool keeps what the largest of them needed.
//
// Any thread. They are made when they are first asked for, and never destroyed: threads, and memory that a driver has
// pinned, may outlive it. A forked child starts with new ones, as a lock that another thread held at fork() stays
// locked in the child.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <limits>
#include <memory>

#include "pipeline/memory/slot_pool.h"

namespace sdio {

template <typename Allocator>
class ProcessSlots {
 public:
  static SlotPool& regions() {
    start_once();
    return *regions_;
  }
  static SlotPool& snapshots() {
    start_once();
    return *snapshots_;
  }

 private:
  static constexpr size_t kMaxIdleRegions = 16;  // 128 MiB

  static void start() {
    regions_ = new SlotPool(std::make_unique<Allocator>(), kMaxIdleRegions);
    snapshots_ = new SlotPool(std::make_unique<Allocator>(), std::numeric_limits<size_t>::max());
  }

  static void start_once() {
    static const bool started = [] {
      start();
      pthread_atfork(nullptr, nullptr, &start);
      return true;
    }();
    static_cast<void>(started);
  }

  static inline SlotPool* regions_ = nullptr;
  static inline SlotPool* snapshots_ = nullptr;
};

}  // namespace sdio
