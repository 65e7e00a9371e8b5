// Writes that several threads make out of slots, which they fill ahead of them.
//
// Each write takes two steps, and any thread can make either: a slot is filled, in ascending order, and is then written
// with one positional write. A thread writes if a filled slot waits and fewer than eight are being written; otherwise
// it fills the next slot, unless four are being filled. With nine threads and twelve slots, a write that ends finds the
// next slot filled. Where one thread is best (the page cache), it is the caller's, which fills and writes in turns.
// Slots go back to the process's pool, so that the next save allocates none.
//
// Slots are filled ahead because direct writes that were queued together end together: if each thread filled its next
// slot only then, the disk would wait for the first of them (docs/performance.md, "Durable writes").
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "pipeline/memory/slot_pool.h"
#include "pipeline/threads/worker_threads.h"

namespace sdio {

// One write, from fill() to write().
struct StagedWrite {
  explicit StagedWrite(SlotPool::Handle slot_) : slot(std::move(slot_)) {}

  size_t index = 0;
  SlotPool::Handle slot;
  std::vector<iovec> pieces;  // what to write, in the slot or elsewhere in memory; empty before fill()
};

// The two steps. They are called from several threads at once, for different slots.
class StagedWriter {
 public:
  virtual ~StagedWriter() = default;

  // Called in ascending order of index. A call may wait for what other calls bring: those have begun before it.
  virtual void fill(StagedWrite& staged) = 0;
  // Returns the bytes to count as done.
  virtual uint64_t write(StagedWrite& staged) = 0;
  // Called in any thread when one has failed: fill() and write() must return from whatever they wait for.
  virtual void cancel() = 0;
};

// How many writes to make at once.
size_t default_num_writers(bool direct, bool from_device);

// How many bytes to write at once, of `total_nbytes`, a power of two. `fine`: few bytes are cut finer, so that there is
// work for every thread, and little staging memory is needed.
size_t default_region_nbytes(uint64_t total_nbytes, bool fine);

// Serves one run().
class StagedWrites {
 public:
  StagedWrites(StagedWriter& writer, SlotPool& slots) : writer_(writer), slots_(slots) {}

  // Makes `count` writes, `num_writers` at once: with 1, or for one write, in this thread. Throws what was thrown
  // first, by a step or by `watch`, when all threads have ended.
  void run(size_t count, size_t num_writers, const Watcher& watch);

  // Asked by steps that take long: whether to go on. See WorkerThreads.
  bool go_on() { return threads_.go_on(); }

 private:
  void work();
  void fill_one(std::unique_lock<std::mutex>& lock);
  std::unique_ptr<StagedWrite> acquire(std::unique_lock<std::mutex>& lock);
  void write_one(std::unique_lock<std::mutex>& lock);
  void cancel();

  bool can_write() const { return !filled_.empty() && num_writing_ < num_writers_; }
  bool can_fill() const;
  bool at_end() const { return next_ == count_ && filled_.empty(); }

  StagedWriter& writer_;
  SlotPool& slots_;
  size_t count_ = 0;
  size_t num_writers_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::unique_ptr<StagedWrite>> filled_;
  std::vector<std::unique_ptr<StagedWrite>> idle_;
  size_t num_slots_left_ = 0;  // not acquired yet
  size_t num_slots_ = 0;       // acquired, or being acquired
  size_t num_filling_ = 0;
  size_t num_writing_ = 0;
  size_t next_ = 0;
  bool cancelled_ = false;
  std::atomic<uint64_t> bytes_done_{0};
  WorkerThreads threads_{[this] { cancel(); }};
};

}  // namespace sdio
