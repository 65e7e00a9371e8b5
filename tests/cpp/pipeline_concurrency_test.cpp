// Saves at once that share the pool of slots, and end well, by an error or by cancellation. For the thread sanitizer as
// much as for what they assert.
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "archive_case.h"
#include "pipeline/memory/slot_pool.h"
#include "pipeline/write/record_checksums.h"

namespace sdio {
namespace {

struct Stop {};

// Refuses every write from the n-th on, in whichever worker makes it.
class RefusingSink final : public PositionalSink {
 public:
  RefusingSink(int fd, int first) : PositionalSink(fd, DirectIo::kAuto), left_(first) {}

 protected:
  ssize_t call_pwritev(int fd, const iovec* pieces, int count, off_t offset) override {
    if (left_-- > 0) return PositionalSink::call_pwritev(fd, pieces, count, offset);
    errno = EIO;
    return -1;
  }

 private:
  std::atomic<int> left_;
};

TEST(Saves, AtOnceDoNotDisturbEachOther) {
  constexpr int kNumSavers = 4;
  std::atomic<int> saved{0}, refused{0}, stopped{0};
  std::vector<std::thread> savers;
  for (int saver = 0; saver < kNumSavers; ++saver) {
    savers.emplace_back([&, saver] {
      const On on = saver % 2 == 0 ? On::kMemory : On::kMixed;
      const Case made = make_case({300000, 17, static_cast<size_t>(saver), 2 << 20, 100, 70000}, 64, on);
      const std::string expected = streamed(*made.records);
      WriteOptions options;
      options.num_writers = 3;
      options.region_nbytes = 65536;
      for (int round = 0; round < 6; ++round) {
        const TemporaryFile file;
        if (round % 3 == 1) {
          RefusingSink sink(file.fd(), saver + round);
          EXPECT_THROW(write_archive(*made.records, sink, options, no_watch), SystemError);
          ++refused;
        } else if (round % 3 == 2) {
          PositionalSink sink(file.fd(), DirectIo::kAuto);
          // The last report comes when all is written: whoever throws there was not cancelled in time, but is heard.
          EXPECT_THROW(write_archive(*made.records, sink, options, [](uint64_t) { throw Stop(); }), Stop);
          ++stopped;
        } else {
          PositionalSink sink(file.fd(), DirectIo::kAuto);
          write_archive(*made.records, sink, options, no_watch);
          EXPECT_TRUE(file.read_all() == expected);
          ++saved;
        }
        if (round == 3) SlotPool::host().release_idle();
      }
    });
  }
  for (std::thread& saver : savers) saver.join();
  EXPECT_EQ(saved, 2 * kNumSavers);
  EXPECT_EQ(refused, 2 * kNumSavers);
  EXPECT_EQ(stopped, 2 * kNumSavers);
}

TEST(Saves, AreCancelledByTheWatcherWhileWorkersWaitForEachOther) {
  // One record over all regions: whoever holds its descriptor waits for the others, and must be woken.
  const Case made = make_case({6 << 20}, 64, On::kDevice);
  WriteOptions options;
  options.num_writers = 4;
  options.region_nbytes = 4096;
  for (int round = 0; round < 3; ++round) {
    const TemporaryFile file;
    PositionalSink sink(file.fd(), DirectIo::kOff);
    int reports = 0;
    EXPECT_THROW(write_archive(*made.records, sink, options,
                               [&](uint64_t) {
                                 if (++reports == 2) throw Stop();
                               }),
                 Stop);
  }
}

TEST(SlotPool, GivesASlotToOneThreadAtATime) {
  SlotPool pool(std::make_unique<HugePageAllocator>(), 3);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 6; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < 200; ++i) {
        const SlotPool::Handle slot = pool.acquire();
        volatile char* const bytes = slot.data();
        bytes[0] = bytes[kSlotNbytes - 1] = static_cast<char>(thread);
        EXPECT_EQ(bytes[0], static_cast<char>(thread));
        if (i % 50 == 49) pool.release_idle();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GE(pool.num_allocated(), 1u);
}

TEST(SlotPool, CountsNoSlotThatCouldNotBeHad) {
  class FailsEveryOther final : public SlotAllocator {
   public:
    std::unique_ptr<SlotMemory> allocate() override {
      if (++calls_ % 2 == 0) throw std::bad_alloc();
      return HugePageAllocator().allocate();
    }

   private:
    int calls_ = 0;
  };
  SlotPool pool(std::make_unique<FailsEveryOther>(), 3);
  std::vector<SlotPool::Handle> slots;
  for (int i = 0; i < 5; ++i) {
    slots.push_back(pool.acquire());
    EXPECT_THROW(pool.acquire(), std::bad_alloc);
    EXPECT_EQ(pool.nbytes(), slots.size() * kSlotNbytes);
  }
  EXPECT_EQ(pool.num_allocated(), 5u);
  slots.clear();
  EXPECT_EQ(pool.nbytes(), 3 * kSlotNbytes);
  EXPECT_EQ(pool.idle_nbytes(), 3 * kSlotNbytes);
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // their heaps keep what was freed

size_t resident_nbytes() {
  std::ifstream statm("/proc/self/statm");
  size_t all = 0, resident = 0;
  statm >> all >> resident;
  return resident * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

// What a worker allocates its arena may keep, and there are more arenas than workers.
TEST(Saves, OfManyRecordsLeaveNothingInTheHeapsOfWorkers) {
  const char* preloaded = getenv("LD_PRELOAD");
  if (preloaded != nullptr && strstr(preloaded, "vgpreload") != nullptr)
    GTEST_SKIP() << "Valgrind keeps what was freed";
  const Case made = make_case(std::vector<size_t>(60000, 10));
  WriteOptions options;
  options.num_writers = 8;
  options.region_nbytes = 1u << 20;
  size_t resident = 0;
  for (int round = 0; round < 15; ++round) {
    const TemporaryFile file;
    PositionalSink sink(file.fd(), DirectIo::kAuto);
    write_archive(*made.records, sink, options, no_watch);
    if (round == 1) resident = resident_nbytes();
  }
  EXPECT_LT(resident_nbytes(), resident + (8u << 20));
}

#endif

TEST(RecordChecksums, WakesThoseWhoWaitWhenThePiecesComeOrTheSaveIsCancelled) {
  constexpr size_t kNumPieces = 1000;
  const std::string bytes(kNumPieces * 10, 'x');
  for (const bool cancelled : {false, true}) {
    const ArchiveLayout layout("case", {{"data/0", bytes.size()}, {"data/1", 5}}, 64);
    RecordChecksums checksums(layout);
    std::atomic<int> heard{0};
    std::vector<std::thread> threads;
    for (int waiter = 0; waiter < 3; ++waiter) {
      threads.emplace_back([&] {
        try {
          checksums.wait(0);
        } catch (const Cancelled&) {
          heard += 10;
        }
        ++heard;
      });
    }
    for (size_t part = 0; part < 2; ++part) {
      threads.emplace_back([&, part] {
        for (size_t i = part; i < kNumPieces - (cancelled ? 10 : 0); i += 2) {
          checksums.add(0, i * 10, &bytes[i * 10], 10, static_cast<uint32_t>(i));
        }
      });
    }
    if (cancelled) checksums.cancel();
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(heard, cancelled ? 33 : 3);
  }
}

}  // namespace
}  // namespace sdio
