// Writes that several threads make out of slots, which they fill ahead of them.
//
// Each write takes two steps, made by any thread: a slot is filled, in ascending order, then written with one
// positional write. A thread writes if a filled slot waits and fewer than eight are being written, else it fills the
// next one unless four are being filled. With nine threads and twelve slots a write that ends finds its successor
// filled. Where one thread is best (the page cache) it is the caller's, in turns. Slots go back to the process's pool:
// the next save allocates none.
//
// Direct writes that were queued together end together. If each thread filled its next slot only then, the disk would
// wait until the first has: where eight threads did, 1 GiB took 1.03 to 1.12 of the raw limit's time, with slots filled
// ahead 1.00 to 1.07 (two cores; six runs of 41 to 61 rounds in turns).
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

// One of them, from fill() to write().
struct StagedWrite {
  explicit StagedWrite(SlotPool::Handle slot_) : slot(std::move(slot_)) {}

  size_t index = 0;
  SlotPool::Handle slot;
  std::vector<iovec> pieces;  // of the file, in the slot or where they lie; empty before fill()
};

// Both steps, called from several threads at once, for different slots.
class StagedWriter {
 public:
  virtual ~StagedWriter() = default;

  // In ascending order of index: one that waits for what others bring waits for fill()s that have begun.
  virtual void fill(StagedWrite& staged) = 0;
  // Returns the bytes to count as done.
  virtual uint64_t write(StagedWrite& staged) = 0;
  // When a thread has failed, from any: fill() and write() must return from whatever they wait for.
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

  // For steps that take long: whether to go on. See WorkerThreads.
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
