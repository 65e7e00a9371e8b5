// Strips against a plain description of them: any rows, from memory and from a device whose copies finish late, direct
// and buffered; failing writes and cancellation.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "checksum/crc32.h"
#include "file/system_error.h"
#include "pipeline/write/strip_plan.h"
#include "pipeline/write/strip_writer.h"
#include "random_bytes.h"

namespace sdio {
namespace {

void no_watch(uint64_t) {}

class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& content) {
    fd_ = mkstemp(path_);
    EXPECT_EQ(pwrite(fd_, content.data(), content.size(), 0), static_cast<ssize_t>(content.size()));
    direct_fd_ = open(path_, O_WRONLY);
    nbytes_ = content.size();
  }
  ~TemporaryFile() {
    close(direct_fd_);
    close(fd_);
    unlink(path_);
  }
  int fd() const { return fd_; }
  int direct_fd() const { return direct_fd_; }
  std::string read_all() const {
    std::string bytes(nbytes_, '\0');
    EXPECT_EQ(pread(fd_, &bytes[0], bytes.size(), 0), static_cast<ssize_t>(nbytes_));
    return bytes;
  }

 private:
  char path_[40] = "/var/tmp/sdio-strip-test-XXXXXX";
  int fd_;
  int direct_fd_;
  size_t nbytes_;
};

class LateDevice final : public DeviceSource {
 public:
  explicit LateDevice(const std::vector<std::string>& sources) : sources_(sources) {}
  void copy(const std::vector<DevicePiece>& pieces) override {
    std::thread engine([this, &pieces] {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      for (const DevicePiece& piece : pieces) {
        std::memcpy(piece.destination, sources_[piece.record].data() + piece.record_offset, piece.nbytes);
      }
    });
    engine.join();
  }
  SlotPool& slots() override { return SlotPool::host(); }

 private:
  const std::vector<std::string>& sources_;
};

struct Case {
  std::vector<std::string> sources;
  std::vector<Strip> strips;
  std::string before;
  std::string after;
  std::vector<uint32_t> crcs;
};

// Strips of all sizes, with bytes of others between their rows and between them; `on_device(i)` says where strip i's
// source is.
template <typename OnDevice>
void make_case(unsigned seed, size_t file_nbytes, OnDevice on_device, Case& made) {
  std::mt19937 random(seed);
  const auto one_of = [&](std::vector<uint64_t> values) { return values[random() % values.size()]; };
  made.before = made.after = random_bytes(file_nbytes, random());
  uint64_t offset = random() % 5000;
  for (size_t i = 0;; ++i) {
    Strip strip;
    strip.row_nbytes = one_of({1, 5, 100, 4096, 65536, 70000, 300000});
    strip.file_pitch = strip.row_nbytes + one_of({0, 1, 64, 4096, 100000});
    strip.num_rows = one_of({1, 2, 7});
    if (offset + strip.file_pitch * strip.num_rows > file_nbytes) break;
    strip.source = i;
    strip.source_offset = random() % 10;
    strip.file_offset = offset;
    strip.nbytes_after = random();
    made.sources.push_back(random_bytes(strip.source_offset + strip.nbytes(), random()));
    const std::string bytes = made.sources.back().substr(strip.source_offset);
    uint32_t crc = 0;
    for (uint64_t row = 0; row < strip.num_rows; ++row) {
      const std::string line = bytes.substr(row * strip.row_nbytes, strip.row_nbytes);
      made.after.replace(offset + row * strip.file_pitch, line.size(), line);
      crc ^= crc32_shift(crc32(0, line.data(), line.size()),
                         (strip.num_rows - 1 - row) * strip.file_pitch + strip.nbytes_after);
    }
    made.crcs.push_back(crc);
    made.strips.push_back(strip);
    offset += strip.file_pitch * strip.num_rows + one_of({0, 0, 3, 4096});
  }
  for (size_t i = 0; i < made.strips.size(); ++i) {
    Strip& strip = made.strips[i];
    if (!on_device(i)) strip.data = made.sources[i].data() + strip.source_offset;
  }
}

TEST(StripPlans, HaveEveryByteOnce) {
  constexpr uint64_t kRegionNbytes = 256u << 10, kAlignment = 4096;
  Case made;
  make_case(5, 12u << 20, [](size_t) { return false; }, made);
  const StripPlan plan(made.strips, kRegionNbytes, kAlignment);
  std::vector<std::vector<int>> taken;
  uint64_t nbytes = 0;
  for (const Strip& strip : made.strips) {
    taken.emplace_back(strip.nbytes());
    nbytes += strip.nbytes();
  }
  EXPECT_EQ(plan.nbytes, nbytes);
  size_t num_parts = 0;
  for (const StripRegion& region : plan.regions) {
    EXPECT_EQ(region.file_offset % kAlignment, 0u);
    ASSERT_EQ(region.first_part, num_parts);
    num_parts += region.num_parts;
    for (size_t i = region.first_part; i < num_parts; ++i) {
      const RowPart& part = plan.parts[i];
      const Strip& strip = made.strips[part.strip];
      EXPECT_GE(part.file_offset, region.file_offset);
      EXPECT_LE(part.file_offset + part.nbytes, region.file_offset + kRegionNbytes);
      const uint64_t row = part.strip_offset / strip.row_nbytes;
      EXPECT_EQ(part.file_offset, strip.file_offset + row * strip.file_pitch + part.strip_offset % strip.row_nbytes);
      const uint64_t end_of_strip = strip.file_offset + (strip.num_rows - 1) * strip.file_pitch + strip.row_nbytes;
      EXPECT_EQ(part.nbytes_after, end_of_strip + strip.nbytes_after - part.file_offset - part.nbytes);
      for (uint64_t at = 0; at < part.nbytes; ++at) ++taken[part.strip][part.strip_offset + at];
    }
  }
  EXPECT_EQ(num_parts, plan.parts.size());
  for (const RowBlock& block : plan.blocks) {
    const uint64_t row_nbytes = made.strips[block.strip].row_nbytes;
    EXPECT_LE(block.num_rows * row_nbytes, kRegionNbytes);
    for (uint64_t at = 0; at < block.num_rows * row_nbytes; ++at)
      ++taken[block.strip][block.first_row * row_nbytes + at];
  }
  for (const std::vector<int>& bytes : taken) {
    EXPECT_EQ(std::count(bytes.begin(), bytes.end(), 1), static_cast<ptrdiff_t>(bytes.size()));
  }
}

class Strips : public testing::TestWithParam<std::tuple<unsigned, DirectIo, size_t>> {};

TEST_P(Strips, LandWhereTheyBelong) {
  const auto [seed, direct_io, region_nbytes] = GetParam();
  Case made;
  make_case(seed, 6u << 20, [](size_t i) { return i % 3 == 1; }, made);
  LateDevice device(made.sources);
  TemporaryFile file(made.before);
  PositionalSink direct(file.direct_fd(), direct_io);
  PositionalSink buffered(file.fd(), DirectIo::kOff);
  StripOptions options;
  options.region_nbytes = region_nbytes;
  options.num_writers = 3;
  uint64_t told = 0;
  const std::vector<StripResult> results =
      write_strips(made.strips, direct, buffered, &device, options, [&](uint64_t done) { told = done; });
  uint64_t nbytes = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    const Strip& strip = made.strips[i];
    nbytes += strip.nbytes();
    EXPECT_EQ(results[i].crc, made.crcs[i]) << i;
    EXPECT_EQ(std::memcmp(results[i].first_bytes, made.sources[i].data() + strip.source_offset,
                          std::min<uint64_t>(8, strip.nbytes())),
              0)
        << i;
  }
  EXPECT_EQ(told, nbytes);
  EXPECT_TRUE(file.read_all() == made.after);
}

INSTANTIATE_TEST_SUITE_P(, Strips,
                         testing::Combine(testing::Range(0u, 6u), testing::Values(DirectIo::kOff, DirectIo::kAuto),
                                          testing::Values(size_t{0}, size_t{1} << 17)));

// Tells in which order writes of several sinks begin.
class OrderedSink final : public PositionalSink {
 public:
  OrderedSink(int fd, DirectIo direct_io, std::atomic<int>& clock) : PositionalSink(fd, direct_io), clock_(clock) {}
  int first = INT_MAX;
  int last = -1;

 protected:
  ssize_t call_pwritev(int fd, const iovec* pieces, int count, off_t offset) override {
    const int now = clock_++;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      first = std::min(first, now);
      last = std::max(last, now);
    }
    return PositionalSink::call_pwritev(fd, pieces, count, offset);
  }

 private:
  std::atomic<int>& clock_;
  std::mutex mutex_;
};

// Shards of whole regions that do not begin at a block: each leaves some bytes for a region of their own.
TEST(StripOrder, NoBufferedWriteStandsBetweenDirectOnes) {
  constexpr size_t kShardNbytes = 1u << 20;
  constexpr size_t kNumShards = 6;
  std::string file_bytes(2 * kShardNbytes * kNumShards, 'x');
  TemporaryFile file(file_bytes);
  std::vector<std::string> sources;
  for (size_t i = 0; i < kNumShards; ++i) sources.emplace_back(kShardNbytes, static_cast<char>('a' + i));
  std::vector<Strip> strips(kNumShards);
  for (size_t i = 0; i < kNumShards; ++i) {
    strips[i].data = sources[i].data();
    strips[i].file_offset = 2 * kShardNbytes * i + 1856;
    strips[i].row_nbytes = strips[i].file_pitch = kShardNbytes;
    strips[i].num_rows = 1;
    file_bytes.replace(strips[i].file_offset, kShardNbytes, sources[i]);
  }
  std::atomic<int> clock{0};
  OrderedSink direct(file.direct_fd(), DirectIo::kAuto, clock);
  OrderedSink buffered(file.fd(), DirectIo::kOff, clock);
  StripOptions options;
  options.region_nbytes = 256u << 10;
  options.num_writers = 3;
  write_strips(strips, direct, buffered, nullptr, options, no_watch);
  EXPECT_TRUE(file.read_all() == file_bytes);
  if (!direct.direct()) GTEST_SKIP() << "direct writes are refused here";
  EXPECT_LT(direct.last, buffered.first);
}

class FailingSink final : public PositionalSink {
 public:
  FailingSink(int fd, int after) : PositionalSink(fd, DirectIo::kOff), left_(after) {}

 protected:
  ssize_t call_pwritev(int fd, const iovec* pieces, int count, off_t offset) override {
    if (left_-- <= 0) {
      errno = ENOSPC;
      return -1;
    }
    return PositionalSink::call_pwritev(fd, pieces, count, offset);
  }

 private:
  std::atomic<int> left_;
};

TEST(StripErrors, AFullDiskIsASystemError) {
  Case made;
  make_case(1, 20u << 20, [](size_t) { return false; }, made);
  TemporaryFile file(made.before);
  for (const int after : {0, 1, 20}) {
    FailingSink direct(file.direct_fd(), after);
    FailingSink buffered(file.fd(), after);
    StripOptions options;
    options.num_writers = 3;
    try {
      write_strips(made.strips, direct, buffered, nullptr, options, no_watch);
      FAIL() << "no error";
    } catch (const SystemError& e) {
      EXPECT_EQ(e.error_number(), ENOSPC);
    }
  }
}

TEST(StripErrors, TheWatchCancels) {
  Case made;
  make_case(2, 64u << 20, [](size_t) { return false; }, made);
  TemporaryFile file(made.before);
  PositionalSink direct(file.direct_fd(), DirectIo::kOff);
  PositionalSink buffered(file.fd(), DirectIo::kOff);
  StripOptions options;
  options.num_writers = 2;
  EXPECT_THROW(write_strips(made.strips, direct, buffered, nullptr, options,
                            [](uint64_t) { throw std::runtime_error("enough"); }),
               std::runtime_error);
}

TEST(StripErrors, NothingIsNothing) {
  TemporaryFile file("x");
  PositionalSink direct(file.direct_fd(), DirectIo::kOff);
  PositionalSink buffered(file.fd(), DirectIo::kOff);
  EXPECT_TRUE(write_strips({}, direct, buffered, nullptr, StripOptions(), no_watch).empty());
  EXPECT_EQ(file.read_all(), "x");
}

}  // namespace
}  // namespace sdio
