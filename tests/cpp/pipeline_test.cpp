// Parallel writing against the sequential stream, with a device whose copies finish late, with failing writes and with
// cancellation.
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "archive_case.h"
#include "checksum/crc32.h"

namespace sdio {
namespace {

class Writing : public testing::TestWithParam<std::tuple<DirectIo, size_t, size_t, On, int>> {};

TEST_P(Writing, InParallelGivesTheBytesOfTheStream) {
  const auto [direct_io, num_threads, region_nbytes, on, alignment] = GetParam();
  const Case made = make_case(kSizes, static_cast<uint64_t>(alignment), on);
  const TemporaryFile file;
  PositionalSink sink(file.fd(), direct_io);
  WriteOptions options;
  options.num_writers = num_threads;
  options.region_nbytes = region_nbytes;
  write_archive(*made.records, sink, options, no_watch);
  const std::string written = file.read_all();
  ASSERT_EQ(written.size(), made.records->layout->file_nbytes());
  EXPECT_TRUE(written == streamed(*made.records));
  for (size_t record = 0; record < made.bytes.size(); ++record) {
    const RecordPlacement& at = made.records->layout->placement(record);
    EXPECT_TRUE(written.compare(at.payload_offset, at.nbytes, made.bytes[record]) == 0) << record;
    if (at.nbytes == 0) continue;
    uint32_t crc;
    std::memcpy(&crc, &written[at.descriptor_offset() + 4], sizeof crc);
    EXPECT_EQ(crc, crc32(0, made.bytes[record].data(), made.bytes[record].size())) << record;
  }
}

INSTANTIATE_TEST_SUITE_P(Ways, Writing,
                         testing::Values(std::make_tuple(DirectIo::kOff, 1, 0, On::kMemory, 64),
                                         std::make_tuple(DirectIo::kOff, 4, 0, On::kMemory, 64),
                                         std::make_tuple(DirectIo::kOff, 3, 4096, On::kMemory, 64),
                                         std::make_tuple(DirectIo::kAuto, 4, 0, On::kMemory, 64),
                                         std::make_tuple(DirectIo::kAuto, 8, 65536, On::kMemory, 64),
                                         std::make_tuple(DirectIo::kAuto, 4, 65536, On::kMemory, 1),
                                         std::make_tuple(DirectIo::kOff, 4, 4096, On::kMemory, 100000),
                                         std::make_tuple(DirectIo::kOff, 4, 1 << 20, On::kDevice, 64),
                                         std::make_tuple(DirectIo::kAuto, 4, 0, On::kDevice, 64),
                                         std::make_tuple(DirectIo::kAuto, 4, 1 << 20, On::kMixed, 3)));

TEST(Writing, WithoutChecksumsLeavesZeros) {
  const Case made = make_case({100, 1 << 20}, 64, On::kMemory, false);
  const std::string all = streamed(*made.records);
  uint32_t crc;
  std::memcpy(&crc, &all[made.records->layout->placement(1).descriptor_offset() + 4], sizeof crc);
  EXPECT_EQ(crc, 0u);
}

TEST(Writing, HoleIsNotWrittenAndReadsAsZeros) {
  Case made = make_case({10, 30 << 20, 10});
  made.records->payloads[1].kind = Payload::Kind::kHole;
  const TemporaryFile file;
  ASSERT_EQ(pwrite(file.fd(), "x", 1, 0), 1);
  PositionalSink sink(file.fd(), DirectIo::kOff);
  write_archive(*made.records, sink, {}, no_watch);
  const RecordPlacement& at = made.records->layout->placement(1);
  EXPECT_TRUE(file.read_all().substr(at.payload_offset, at.nbytes) == std::string(at.nbytes, '\0'));
}

TEST(Writing, SecondTimeAllocatesNoSlots) {
  const Case made = make_case(kSizes);
  const TemporaryFile file;
  for (int round = 0; round < 3; ++round) {
    PositionalSink sink(file.fd(), DirectIo::kAuto);
    WriteOptions options;
    options.num_writers = 2;
    options.region_nbytes = 1 << 20;
    const size_t before = SlotPool::host().num_allocated();
    write_archive(*made.records, sink, options, no_watch);
    if (round > 0) {
      EXPECT_EQ(SlotPool::host().num_allocated(), before);
    }
  }
}

TEST(Writing, PaddingCarriesNoBytesOfAnEarlierSave) {
  const Case secret = make_case({8 << 20});
  const Case tiny = make_case({1});
  for (const Case* made : {&secret, &tiny}) {
    const TemporaryFile file;
    PositionalSink sink(file.fd(), DirectIo::kAuto);
    write_archive(*made->records, sink, {}, no_watch);
    EXPECT_TRUE(file.read_all() == streamed(*made->records));
  }
}

class FailingSink final : public PositionalSink {
 public:
  FailingSink(int fd, int fail_at) : PositionalSink(fd, DirectIo::kOff), fail_at_(fail_at) {}
  std::atomic<int> calls{0};

 protected:
  ssize_t call_pwritev(int fd, const iovec* pieces, int count, off_t offset) override {
    if (calls++ != fail_at_) return PositionalSink::call_pwritev(fd, pieces, count, offset);
    errno = ENOSPC;
    return -1;
  }

 private:
  const int fail_at_;
};

TEST(Writing, FailureOfAnyWriteEndsTheSaveWithItsError) {
  const Case made = make_case(kSizes, 64, On::kMixed);
  WriteOptions options;
  options.num_writers = 4;
  options.region_nbytes = 1 << 20;
  const TemporaryFile file;
  const auto num_regions = static_cast<int>(made.records->layout->file_nbytes() >> 20) + 1;
  for (int fail_at = 0; fail_at < num_regions; ++fail_at) {
    FailingSink sink(file.fd(), fail_at);
    try {
      write_archive(*made.records, sink, options, no_watch);
      FAIL() << "write " << fail_at << " failed and nobody said so";
    } catch (const SystemError& e) {
      EXPECT_EQ(e.error_number(), ENOSPC);
    }
  }
}

class SlowSink final : public PositionalSink {
 public:
  explicit SlowSink(int fd) : PositionalSink(fd, DirectIo::kOff) {}

  std::atomic<bool> is_watched_from_elsewhere{false};
  std::atomic<bool> was_watched{false};

 protected:
  ssize_t call_pwritev(int fd, const iovec* pieces, int count, off_t offset) override {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    // However late the watcher comes, there is something left to be written.
    while (num_calls_++ > 2 && is_watched_from_elsewhere && !was_watched) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return PositionalSink::call_pwritev(fd, pieces, count, offset);
  }

 private:
  std::atomic<int> num_calls_{0};
};

class Watching : public testing::TestWithParam<size_t> {};  // threads: one is the caller's own
INSTANTIATE_TEST_SUITE_P(Threads, Watching, testing::Values(1, 2));

TEST_P(Watching, WatcherSeesProgressAndCanCancel) {
  const Case made = make_case({30 << 20});
  const TemporaryFile file;
  SlowSink sink(file.fd());
  WriteOptions options;
  options.num_writers = GetParam();
  options.region_nbytes = 1 << 20;
  sink.is_watched_from_elsewhere = GetParam() > 1;
  struct Stop {};
  uint64_t seen = 0;
  const auto stop_at_progress = [&](uint64_t bytes_done) {
    EXPECT_GE(bytes_done, seen);
    seen = bytes_done;
    if (seen == 0) return;
    sink.was_watched = true;
    throw Stop();
  };
  EXPECT_THROW(write_archive(*made.records, sink, options, stop_at_progress), Stop);
  EXPECT_GT(seen, 0u);
  EXPECT_LT(seen, made.records->layout->file_nbytes());
}

TEST(Writing, LastReportIsTheWholeFile) {
  const Case made = make_case({1000});
  const TemporaryFile file;
  PositionalSink sink(file.fd(), DirectIo::kOff);
  uint64_t last = 0;
  write_archive(*made.records, sink, {}, [&](uint64_t bytes_done) { last = bytes_done; });
  EXPECT_EQ(last, made.records->layout->file_nbytes());
}

}  // namespace
}  // namespace sdio
