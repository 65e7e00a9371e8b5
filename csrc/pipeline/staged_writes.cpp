#include "pipeline/staged_writes.h"

#include <algorithm>
#include <utility>

namespace sdio {
namespace {

// Writes end several at once. Eight were no better.
constexpr size_t kSlotsAhead = 4;

}  // namespace

void StagedWrites::run(size_t count, size_t num_writers, const Watcher& watch) {
  count_ = count;
  num_writers_ = std::min(num_writers, count);
  const bool alone = num_writers_ <= 1;
  // All of them now, used or not: how many are needed is chance, and the next save is to find enough in the pool.
  const size_t num_slots = std::min(count, alone ? 1 : num_writers_ + kSlotsAhead);
  while (idle_.size() < num_slots) idle_.push_back(std::make_unique<StagedWrite>(slots_.acquire()));
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
  std::unique_ptr<StagedWrite> staged = std::move(idle_.back());
  idle_.pop_back();
  staged->index = next_++;
  lock.unlock();
  staged->pieces.clear();
  writer_.fill(*staged);
  lock.lock();
  filled_.push_back(std::move(staged));
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
