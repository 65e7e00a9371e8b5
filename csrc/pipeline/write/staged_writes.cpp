#include "pipeline/write/staged_writes.h"

#include <algorithm>
#include <new>
#include <utility>

#include "pipeline/memory/address_space.h"

namespace sdio {
namespace {

// Several writes end at once, so several slots must be ready. At most as many are being filled at a time. Eight were no
// better.
constexpr size_t kSlotsAhead = 4;

constexpr size_t kSmallestRegionNbytes = 1u << 20;
constexpr uint64_t kRegionsAtLeast = 32;

}  // namespace

// Large writes keep the device's queue full, and cost the page cache fewest calls.
size_t default_region_nbytes(uint64_t total_nbytes, bool fine) {
  size_t nbytes = kSlotNbytes;
  while (fine && nbytes > kSmallestRegionNbytes && total_nbytes / nbytes < kRegionsAtLeast) nbytes /= 2;
  return nbytes;
}

size_t default_num_writers(bool direct, bool from_device) {
  // Enough to keep the device's queue full, also where the processes of other ranks write to it.
  if (direct) return 8;
  // Buffered writes contend for the inode's lock and the page allocator, so one is best, in the caller's thread, on
  // whose core the page cache finds freed pages. From a device a second one writes while slots are filled.
  // docs/performance.md, "durable=False", has the figures.
  return from_device ? 2 : 1;
}

void StagedWrites::run(size_t count, size_t num_writers, const Watcher& watch) {
  count_ = count;
  num_writers_ = std::min(num_writers, count);
  const bool alone = num_writers_ <= 1;
  num_slots_left_ = affordable(std::min(count, alone ? 1 : num_writers_ + kSlotsAhead), kSlotNbytes, 1);
  threads_.run(alone ? 0 : num_writers_ + 1, [this] { work(); }, [&] { watch(bytes_done_); });
}

void StagedWrites::work() {
  while (threads_.go_on()) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return can_write() || can_fill() || at_end() || cancelled_; });
    if (cancelled_) return;
    if (can_write()) {
      write_one(lock);
    } else if (can_fill()) {
      fill_one(lock);
    } else {
      return;
    }
    changed_.notify_one();
    if (at_end()) changed_.notify_all();
  }
}

void StagedWrites::fill_one(std::unique_lock<std::mutex>& lock) {
  ++num_filling_;
  // A new slot is acquired even where a used one is idle: how many a save needs at once is chance, and the next save
  // should find in the pool all that it may need.
  std::unique_ptr<StagedWrite> staged = num_slots_left_ > 0 ? acquire(lock) : nullptr;
  if (staged == nullptr && !idle_.empty()) {
    staged = std::move(idle_.back());
    idle_.pop_back();
  }
  if (staged != nullptr && next_ < count_) {
    staged->index = next_++;
    staged->pieces.clear();
    lock.unlock();
    writer_.fill(*staged);
    lock.lock();
    filled_.push_back(std::move(staged));
  } else if (staged != nullptr) {
    idle_.push_back(std::move(staged));
  }
  --num_filling_;
}

// Null where there is no memory for another slot; those that were acquired before do the work then.
std::unique_ptr<StagedWrite> StagedWrites::acquire(std::unique_lock<std::mutex>& lock) {
  --num_slots_left_;
  ++num_slots_;
  lock.unlock();  // other threads go on meanwhile: pinning memory takes a while
  std::unique_ptr<StagedWrite> staged;
  try {
    staged = std::make_unique<StagedWrite>(slots_.acquire());
  } catch (const std::bad_alloc&) {
    lock.lock();
    num_slots_left_ = 0;
    if (--num_slots_ == 0) throw;
    return nullptr;
  }
  lock.lock();
  return staged;
}

bool StagedWrites::can_fill() const {
  return next_ < count_ && num_filling_ < kSlotsAhead && (num_slots_left_ > 0 || !idle_.empty());
}

void StagedWrites::write_one(std::unique_lock<std::mutex>& lock) {
  std::unique_ptr<StagedWrite> staged = std::move(filled_.front());
  filled_.pop_front();
  ++num_writing_;
  lock.unlock();
  bytes_done_ += writer_.write(*staged);
  lock.lock();
  --num_writing_;
  idle_.push_back(std::move(staged));
}

void StagedWrites::cancel() {
  writer_.cancel();
  const std::lock_guard<std::mutex> lock(mutex_);
  cancelled_ = true;
  changed_.notify_all();
}

}  // namespace sdio
