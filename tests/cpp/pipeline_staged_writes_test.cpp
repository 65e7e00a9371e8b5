// What is filled and written when, and how it ends: StagedWrites with steps that only count, wait or throw.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "pipeline/memory/slot_pool.h"
#include "pipeline/write/staged_writes.h"

namespace sdio {
namespace {

using Clock = std::chrono::steady_clock;

struct Stop {};

class Steps : public StagedWriter {
 public:
  void fill(StagedWrite& staged) override {
    std::lock_guard<std::mutex> lock(mutex_);
    EXPECT_TRUE(staged.pieces.empty());
    staged.pieces.push_back({staged.slot.data(), staged.index});
    filled.push_back(staged.index);
    changed_.notify_all();
  }

  uint64_t write(StagedWrite& staged) override {
    EXPECT_EQ(staged.pieces.size(), 1u);
    EXPECT_EQ(staged.pieces.front().iov_base, staged.slot.data());
    EXPECT_EQ(staged.pieces.front().iov_len, staged.index);
    std::lock_guard<std::mutex> lock(mutex_);
    written.push_back(staged.index);
    threads.push_back(std::this_thread::get_id());
    return 1;
  }

  void cancel() override {
    std::lock_guard<std::mutex> lock(mutex_);
    ++num_cancels;
    changed_.notify_all();
  }

  std::vector<size_t> filled, written;
  std::vector<std::thread::id> threads;
  int num_cancels = 0;

 protected:
  std::mutex mutex_;
  std::condition_variable changed_;
};

std::vector<size_t> up_to(size_t count) {
  std::vector<size_t> indices(count);
  for (size_t i = 0; i < count; ++i) indices[i] = i;
  return indices;
}

void no_watch(uint64_t) {}

TEST(StagedWrites, WriteEachOnceInSlotsThatAreUsedAgain) {
  for (const size_t num_writers : {1, 2, 8}) {
    for (const size_t count : {0, 1, 2, 7, 1000}) {
      Steps steps;
      SlotPool slots(std::make_unique<HugePageAllocator>(), 0);
      StagedWrites(steps, slots).run(count, num_writers, no_watch);
      std::sort(steps.filled.begin(), steps.filled.end());  // begun in order, recorded as they come
      std::sort(steps.written.begin(), steps.written.end());
      EXPECT_EQ(steps.filled, up_to(count));
      EXPECT_EQ(steps.written, up_to(count));
      EXPECT_EQ(steps.num_cancels, 0);
      EXPECT_EQ(slots.num_allocated(), std::min(count, num_writers == 1 ? 1 : num_writers + 4));
    }
  }
}

TEST(StagedWrites, OfOneWriterAreMadeByTheCallerInOrder) {
  Steps steps;
  StagedWrites(steps, SlotPool::host()).run(20, 1, no_watch);
  EXPECT_EQ(steps.filled, up_to(20));
  EXPECT_EQ(steps.written, up_to(20));
  EXPECT_EQ(std::count(steps.threads.begin(), steps.threads.end(), std::this_thread::get_id()), 20);
}

// While all writes are under way, slots are filled for the next ones, and no more than are to be.
class BlockedWrites final : public Steps {
 public:
  BlockedWrites(size_t num_writers, size_t num_ahead) : num_writers_(num_writers), num_ahead_(num_ahead) {}

  uint64_t write(StagedWrite& staged) override {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      ++num_writing_;
      most_writing = std::max(most_writing, num_writing_);
      changed_.notify_all();
      const bool filled_ahead = changed_.wait_for(lock, std::chrono::seconds(30), [&] {
        return let_go_ || (num_writing_ == num_writers_ && filled.size() == num_writers_ + num_ahead_);
      });
      EXPECT_TRUE(filled_ahead) << filled.size() << " filled, " << num_writing_ << " being written";
      let_go_ = true;
    }
    if (staged.index == 0) {  // time for a fill that should not be
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    const uint64_t done = Steps::write(staged);
    std::lock_guard<std::mutex> lock(mutex_);
    --num_writing_;
    return done;
  }

  size_t most_writing = 0;

 private:
  const size_t num_writers_, num_ahead_;
  size_t num_writing_ = 0;
  bool let_go_ = false;
};

TEST(StagedWrites, HaveFilledSlotsAtHandWhenWritesEnd) {
  BlockedWrites steps(3, 4);
  StagedWrites(steps, SlotPool::host()).run(50, 3, no_watch);
  EXPECT_EQ(steps.written.size(), 50u);
  EXPECT_EQ(steps.most_writing, 3u);
}

// A fill may need more memory than its slot: the writers' threads do not all begin with one.
class BlockedFills final : public Steps {
 public:
  explicit BlockedFills(size_t num_fills) : num_fills_(num_fills) {}

  void fill(StagedWrite& staged) override {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      most_filling = std::max(most_filling, ++num_filling_);
      changed_.notify_all();
      const bool all =
          changed_.wait_for(lock, std::chrono::seconds(30), [&] { return let_go_ || num_filling_ == num_fills_; });
      EXPECT_TRUE(all) << num_filling_ << " being filled";
      let_go_ = true;
    }
    if (staged.index == 0) {  // time for one that should not be
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    Steps::fill(staged);
    std::lock_guard<std::mutex> lock(mutex_);
    --num_filling_;
  }

  size_t most_filling = 0;

 private:
  const size_t num_fills_;
  size_t num_filling_ = 0;
  bool let_go_ = false;
};

TEST(StagedWrites, FillFourSlotsAtOnce) {
  BlockedFills steps(4);
  StagedWrites(steps, SlotPool::host()).run(50, 8, no_watch);
  EXPECT_EQ(steps.written.size(), 50u);
  EXPECT_EQ(steps.most_filling, 4u);
}

// The steps before the failing one wait for what it would have brought.
class FailingStep final : public Steps {
 public:
  FailingStep(bool in_fill, size_t index) : in_fill_(in_fill), index_(index) {}

  void fill(StagedWrite& staged) override {
    if (in_fill_ && staged.index == index_) throw std::runtime_error("no");
    Steps::fill(staged);
    if (!in_fill_ || staged.index + 1 != index_) return;
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return num_cancels != 0; });
  }

  uint64_t write(StagedWrite& staged) override {
    if (!in_fill_ && staged.index == index_) throw std::runtime_error("no");
    return Steps::write(staged);
  }

 private:
  const bool in_fill_;
  const size_t index_;
};

TEST(StagedWrites, EndWithTheErrorOfAnyStep) {
  for (const bool in_fill : {false, true}) {
    for (const size_t index : {0, 1, 5, 99}) {
      FailingStep steps(in_fill, index);
      EXPECT_THROW(StagedWrites(steps, SlotPool::host()).run(100, 4, no_watch), std::runtime_error);
      EXPECT_EQ(std::count(steps.written.begin(), steps.written.end(), index), 0);
      EXPECT_GE(steps.num_cancels, 1);
    }
  }
  FailingStep alone(false, 3);
  EXPECT_THROW(StagedWrites(alone, SlotPool::host()).run(100, 1, no_watch), std::runtime_error);
  EXPECT_EQ(alone.written, up_to(3));
}

// Nobody writes until the watch has thrown, which the threads that wait for slots are to hear of too.
class EndlessWrite final : public Steps {
 public:
  uint64_t write(StagedWrite&) override {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return num_cancels != 0; });
    return 0;
  }
};

TEST(StagedWrites, EndWhereTheWatchThrows) {
  EndlessWrite steps;
  const auto start = Clock::now();
  EXPECT_THROW(StagedWrites(steps, SlotPool::host()).run(100, 4, [](uint64_t) { throw Stop(); }), Stop);
  EXPECT_LT(Clock::now() - start, std::chrono::seconds(20));
  EXPECT_LE(steps.filled.size(), 8u);
}

}  // namespace
}  // namespace sdio
