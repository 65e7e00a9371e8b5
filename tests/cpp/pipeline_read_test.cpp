// Parallel reading: plans, payloads against what was written, foreign layouts, failing reads, cancellation, memory.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "archive/corrupt_archive.h"
#include "archive/layout.h"
#include "checksum/crc32.h"
#include "file/system_error.h"
#include "late_device.h"
#include "pipeline/memory/slot_pool.h"
#include "pipeline/read/payload_reader.h"
#include "pipeline/read/read_plan.h"
#include "pipeline/read/single_reads.h"
#include "pipeline/write/archive_writer.h"
#include "random_bytes.h"
#include "temporary_file.h"
#include "zip_builder.h"

namespace sdio {
namespace {

constexpr size_t kMiB = 1u << 20;

void no_watch(uint64_t, uint64_t) {}

// Payloads by request, and what holds them.
class TestMemory : public PayloadMemory {
 public:
  char* allocate(size_t request, uint64_t nbytes) override {
    std::lock_guard<std::mutex> lock(mutex_);
    EXPECT_EQ(payloads_.count(request), 0u) << "request " << request << " twice";
    owned_.push_back(std::make_unique<char[]>(nbytes + 1));
    payloads_[request] = {owned_.back().get(), nbytes};
    return owned_.back().get();
  }
  void adopt(size_t request, char* data, uint64_t nbytes, std::shared_ptr<ExtentMemory> extent) override {
    std::lock_guard<std::mutex> lock(mutex_);
    EXPECT_EQ(payloads_.count(request), 0u) << "request " << request << " twice";
    EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % 16, 0u);
    payloads_[request] = {data, nbytes};
    extents_.push_back(std::move(extent));
    ++num_adopted;
  }
  std::string payload(size_t request) const {
    const auto& [data, nbytes] = payloads_.at(request);
    return std::string(data, nbytes);
  }
  size_t size() const { return payloads_.size(); }
  std::atomic<size_t> num_adopted{0};

 private:
  std::mutex mutex_;
  std::map<size_t, std::pair<char*, uint64_t>> payloads_;
  std::vector<std::unique_ptr<char[]>> owned_;
  std::vector<std::shared_ptr<ExtentMemory>> extents_;
};

struct Made {
  std::vector<std::string> payloads;  // in directory order
  std::string file;
};

// As torch would: aligned, sizes in descriptors.
Made made_by_torch(const std::vector<size_t>& sizes, uint64_t alignment) {
  Made made;
  std::vector<RecordSpec> specs;
  std::vector<Payload> payloads;
  for (size_t i = 0; i < sizes.size(); ++i) {
    made.payloads.push_back(random_bytes(sizes[i], i));
    specs.push_back({"data/" + std::to_string(i), sizes[i]});
  }
  for (const std::string& payload : made.payloads) payloads.push_back({Payload::Kind::kMemory, payload.data()});
  const Records records{std::make_shared<const ArchiveLayout>("case", specs, alignment), payloads};
  stream_archive(records, [&](const char* bytes, size_t nbytes) { made.file.append(bytes, nbytes); }, [](uint64_t) {});
  return made;
}

// As others would: no alignment, any extra field, sizes in the local header.
Made made_by_others(const std::vector<size_t>& sizes) {
  Made made;
  ZipBuilder zip;
  std::mt19937_64 random(7);
  for (size_t i = 0; i < sizes.size(); ++i) {
    made.payloads.push_back(random_bytes(sizes[i], i));
    ZipRecord record = {"c/data/" + std::to_string(i), made.payloads.back()};
    record.local_extra = std::string(random() % 5 == 0 ? random() % 65535 : random() % 20, 'e');
    record.descriptor = random() % 2 == 0;
    record.zip64 = random() % 3 == 0 && record.local_extra.size() < 60000;
    zip.add(record);
  }
  made.file = zip.finish();
  return made;
}

std::vector<size_t> all_of(const Made& made) {
  std::vector<size_t> records(made.payloads.size());
  std::iota(records.begin(), records.end(), size_t{0});
  return records;
}

const std::vector<size_t> kSizes = {3,     0,      kMiB,  12345, 64,     2 * kMiB, 1000003, 100000, 8,       5,
                                    65535, 65536,  65537, 4096,  200000, 1,        63,      70000,  9437185, 32768,
                                    0,     131072, 40000, 50000, 66000,  1000,     1000,    2};

class Reading : public testing::TestWithParam<std::tuple<DirectIo, size_t, uint64_t, int>> {
 protected:
  void SetUp() override {
    const auto [direct_io, num_threads, span_nbytes, alignment] = GetParam();
    made = alignment != 0 ? made_by_torch(kSizes, static_cast<uint64_t>(alignment)) : made_by_others(kSizes);
    file.write_all(made.file);
    if (direct_io != DirectIo::kOff) file.make_cold();
    source.emplace(file.fd(), direct_io);
    options = {num_threads, span_nbytes};
  }

  Made made;
  const TemporaryFile file;
  std::optional<PositionalSource> source;
  ReadOptions options;
};

TEST_P(Reading, GivesThePayloadsThatWereWritten) {
  const Directory directory = read_directory(*source);
  std::vector<size_t> records = all_of(made);
  std::mt19937_64 random(options.num_threads);
  for (int round = 0; round < 4; ++round) {  // all in order, all shuffled, two subsets
    if (round > 0) std::shuffle(records.begin(), records.end(), random);
    if (round > 1) records.resize(records.size() / 2);
    for (const bool verify : {false, true}) {
      TestMemory memory;
      EXPECT_EQ(load_payloads(directory, *source, records, memory, verify, options, no_watch), std::vector<size_t>());
      ASSERT_EQ(memory.size(), records.size());
      for (size_t i = 0; i < records.size(); ++i) {
        ASSERT_TRUE(memory.payload(i) == made.payloads[records[i]]) << "record " << records[i] << " round " << round;
      }
      EXPECT_EQ(memory.num_adopted, static_cast<size_t>(std::count_if(records.begin(), records.end(), [](size_t i) {
                  return kSizes[i] >= kMinPayloadInExtentNbytes;
                })));
    }
    const std::vector<uint32_t> crcs = payload_checksums(directory, *source, records, options, no_watch);
    for (size_t i = 0; i < records.size(); ++i) {
      const std::string& payload = made.payloads[records[i]];
      EXPECT_EQ(crcs[i], crc32(0, payload.data(), payload.size())) << "record " << records[i];
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Ways, Reading,
    testing::Values(std::make_tuple(DirectIo::kOff, 1, 0, 64), std::make_tuple(DirectIo::kOff, 4, 0, 64),
                    std::make_tuple(DirectIo::kOff, 3, 4096, 64), std::make_tuple(DirectIo::kOff, 4, 65536, 1),
                    std::make_tuple(DirectIo::kOff, 4, 65536, 0), std::make_tuple(DirectIo::kOff, 4, 4096, 0),
                    std::make_tuple(DirectIo::kOff, 4, 0, 65536), std::make_tuple(DirectIo::kAuto, 4, 0, 64),
                    std::make_tuple(DirectIo::kAuto, 8, 65536, 64), std::make_tuple(DirectIo::kAuto, 4, 65536, 0),
                    std::make_tuple(DirectIo::kAuto, 2, 0, 4096), std::make_tuple(DirectIo::kAuto, 4, 0, 0)));

// Every single flipped bit of a payload is seen, and nothing else is blamed.
TEST(Reading, VerifyFindsAFlippedBitAnywhere) {
  const std::vector<size_t> sizes = {1, 100, 65536, 300000, 5, 70001};
  std::mt19937_64 random(3);
  for (const bool torchs : {true, false}) {
    Made made = torchs ? made_by_torch(sizes, 64) : made_by_others(sizes);
    const TemporaryFile file;
    file.write_all(made.file);
    PositionalSource source(file.fd(), DirectIo::kOff);
    const Directory directory = read_directory(source);
    const std::vector<size_t> records = all_of(made);
    for (int round = 0; round < 100; ++round) {
      const size_t record = random() % sizes.size();
      const uint64_t offset = read_payload_offset(directory, source, record) + random() % sizes[record];
      char byte = made.file[offset];
      byte = static_cast<char>(byte ^ (1 << random() % 8));
      ASSERT_EQ(pwrite(file.fd(), &byte, 1, static_cast<off_t>(offset)), 1);
      TestMemory memory;
      const ReadOptions options = {1 + random() % 3, round % 2 == 0 ? uint64_t{0} : uint64_t{4096}};
      EXPECT_EQ(load_payloads(directory, source, records, memory, true, options, no_watch),
                std::vector<size_t>{record});
      EXPECT_NE(payload_checksums(directory, source, {record}, options, no_watch)[0], directory[record].crc32);
      ASSERT_EQ(pwrite(file.fd(), &made.file[offset], 1, static_cast<off_t>(offset)), 1);
    }
  }
}

std::vector<uint64_t> sizes_of(const Made& made) {
  std::vector<uint64_t> sizes;
  for (const std::string& payload : made.payloads) sizes.push_back(payload.size());
  return sizes;
}

TEST_P(Reading, GivesADeviceThePayloadsThatWereWritten) {
  const Directory directory = read_directory(*source);
  for (const bool verify : {false, true}) {
    LateDevice device(sizes_of(made));
    EXPECT_EQ(load_payloads_onto(directory, *source, all_of(made), device, verify, options, no_watch),
              std::vector<size_t>());
    EXPECT_TRUE(device.sound);
    for (size_t i = 0; i < kSizes.size(); ++i) {
      EXPECT_EQ(crc32(0, device.payloads[i].data(), kSizes[i]), crc32(0, made.payloads[i].data(), kSizes[i])) << i;
    }
  }
}

TEST(Reading, VerifyFindsAFlippedBitOnTheWayToADevice) {
  const Made made = made_by_torch(kSizes, 64);
  const size_t record = 18;  // of 9 MiB, over several spans
  const TemporaryFile file;
  file.write_all(made.file);
  PositionalSource source(file.fd(), DirectIo::kAuto);
  const Directory directory = read_directory(source);
  const uint64_t at = read_payload_offset(directory, source, record) + 5000000;
  const char byte = static_cast<char>(made.file[at] ^ 1);
  ASSERT_EQ(pwrite(file.fd(), &byte, 1, static_cast<off_t>(at)), 1);
  LateDevice device(sizes_of(made));
  EXPECT_EQ(load_payloads_onto(directory, source, all_of(made), device, true, {4, kMiB}, no_watch),
            std::vector<size_t>{record});
}

TEST(Reading, RefusesWhatItCannotRead) {
  ZipBuilder zip;
  zip.add({"c/a", std::string(10, 'a')});
  zip.add({"c/b", std::string(10, 'b'), kMethodDeflate, 100});
  const TemporaryFile file;
  file.write_all(zip.finish());
  PositionalSource source(file.fd(), DirectIo::kOff);
  const Directory directory = read_directory(source);
  for (const std::vector<size_t>& records : {std::vector<size_t>{0, 0}, {2}, {0, 1}}) {
    TestMemory memory;
    EXPECT_THROW(load_payloads(directory, source, records, memory, false, {}, no_watch), std::invalid_argument);
    EXPECT_THROW(payload_checksums(directory, source, records, {}, no_watch), std::invalid_argument);
  }
  char byte;
  EXPECT_THROW(read_stored(directory, source, 0, 10, 1, &byte), std::out_of_range);
  EXPECT_THROW(read_stored(directory, source, 0, ~uint64_t{0}, 2, &byte), std::out_of_range);
  read_stored(directory, source, 1, 9, 1, &byte);
  EXPECT_EQ(byte, 'b');
}

TEST(Reading, OfNothingIsNothing) {
  const TemporaryFile file;
  file.write_all(ZipBuilder().finish());
  PositionalSource source(file.fd(), DirectIo::kOff);
  const Directory directory = read_directory(source);
  TestMemory memory;
  EXPECT_EQ(load_payloads(directory, source, {}, memory, true, {}, no_watch), std::vector<size_t>());
  EXPECT_EQ(payload_checksums(directory, source, {}, {}, no_watch), std::vector<uint32_t>());
}

TEST(Reading, ALocalHeaderThatLiesIsNamedWhereverItsSpanEnds) {
  const std::vector<size_t> sizes = {100, 70000, 5000, 300000, 10};
  const Made made = made_by_torch(sizes, 64);
  const TemporaryFile file;
  for (size_t record = 0; record < sizes.size(); ++record) {
    file.write_all(made.file);
    PositionalSource source(file.fd(), DirectIo::kOff);
    const Directory directory = read_directory(source);
    ASSERT_EQ(pwrite(file.fd(), "XY", 2, static_cast<off_t>(directory[record].header_offset)), 2);
    for (const uint64_t span_nbytes : {0, 4096, 65536}) {
      TestMemory memory;
      try {
        load_payloads(directory, source, all_of(made), memory, false, {2, span_nbytes}, no_watch);
        FAIL() << "record " << record;
      } catch (const CorruptArchive& e) {
        EXPECT_NE(std::string(e.what()).find("case/data/" + std::to_string(record)), std::string::npos) << e.what();
      }
      EXPECT_THROW(payload_checksums(directory, source, all_of(made), {2, span_nbytes}, no_watch), CorruptArchive);
      LateDevice device(sizes_of(made));
      EXPECT_THROW(load_payloads_onto(directory, source, all_of(made), device, false, {2, span_nbytes}, no_watch),
                   CorruptArchive);
      EXPECT_EQ(device.payloads[record], LateDevice({sizes[record]}).payloads[0]) << "copied before it was checked";
    }
  }
}

TEST(Reading, AHeaderMayLieInTwoReads) {
  for (size_t before_end = 0; before_end < 300; before_end += 11) {  // of the first MiB, which is read at once
    const Made made = made_by_torch({kMiB - before_end, 200000, 100}, 64);
    const TemporaryFile file;
    file.write_all(made.file);
    PositionalSource source(file.fd(), DirectIo::kOff);
    const Directory directory = read_directory(source);
    TestMemory memory;
    EXPECT_TRUE(load_payloads(directory, source, all_of(made), memory, true, {1, 0}, no_watch).empty());
    LateDevice device(sizes_of(made));
    EXPECT_TRUE(load_payloads_onto(directory, source, all_of(made), device, true, {1, 0}, no_watch).empty());
    for (size_t i = 0; i < made.payloads.size(); ++i) {
      EXPECT_TRUE(memory.payload(i) == made.payloads[i] && device.payloads[i] == made.payloads[i]) << before_end;
    }
  }
}

class FailingSource final : public PositionalSource {
 public:
  FailingSource(int fd, int fail_at) : PositionalSource(fd, DirectIo::kOff), fail_at_(fail_at) {}
  std::atomic<int> calls{0};

 protected:
  ssize_t call_pread(int fd, char* destination, size_t nbytes, off_t offset) override {
    if (calls++ != fail_at_) return PositionalSource::call_pread(fd, destination, nbytes, offset);
    errno = EIO;
    return -1;
  }

 private:
  const int fail_at_;
};

TEST(Reading, FailureOfAnyReadEndsTheLoadWithItsError) {
  const Made made = made_by_torch({3, 0, 300000, 12345, 64, 700000, 100000, 8, 65536, 4096, 70000, 2}, 64);
  const ReadOptions options = {4, 65536};
  const TemporaryFile file;
  file.write_all(made.file);
  PositionalSource sound(file.fd(), DirectIo::kOff);
  const Directory directory = read_directory(sound);
  FailingSource counting(file.fd(), -1);
  TestMemory all;
  load_payloads(directory, counting, all_of(made), all, true, options, no_watch);
  ASSERT_GT(counting.calls, 20);
  for (int fail_at = 0; fail_at < counting.calls; ++fail_at) {
    for (const std::string to : {"memory", "a device", "nowhere"}) {
      FailingSource source(file.fd(), fail_at);
      try {
        TestMemory memory;
        LateDevice device(sizes_of(made));
        if (to == "memory") {
          load_payloads(directory, source, all_of(made), memory, true, options, no_watch);
        } else if (to == "a device") {
          load_payloads_onto(directory, source, all_of(made), device, true, options, no_watch);
        } else {
          payload_checksums(directory, source, all_of(made), options, no_watch);
        }
        EXPECT_LE(source.calls, fail_at) << "read " << fail_at << " failed and nobody said so";
      } catch (const SystemError& e) {
        EXPECT_EQ(e.error_number(), EIO);
      }
    }
  }
}

TEST(Reading, AFileThatWasCutOffMeanwhileIsAnError) {
  const Made made = made_by_torch(kSizes, 64);
  const TemporaryFile file;
  for (const DirectIo direct_io : {DirectIo::kOff, DirectIo::kAuto}) {
    file.write_all(made.file);
    file.make_cold();
    PositionalSource source(file.fd(), direct_io);
    const Directory directory = read_directory(source);
    ASSERT_EQ(ftruncate(file.fd(), static_cast<off_t>(made.file.size() / 2)), 0);
    TestMemory memory;
    EXPECT_THROW(load_payloads(directory, source, all_of(made), memory, false, {}, no_watch), UnexpectedEnd);
    EXPECT_THROW(payload_checksums(directory, source, all_of(made), {}, no_watch), UnexpectedEnd);
    EXPECT_THROW(read_directory(source), UnexpectedEnd);
  }
}

class RefusingMemory final : public TestMemory {
 public:
  char* allocate(size_t request, uint64_t nbytes) override {
    if (request == 3) throw std::bad_alloc();
    return TestMemory::allocate(request, nbytes);
  }
};

TEST(Reading, MemoryThatIsRefusedEndsTheLoad) {
  const Made made = made_by_torch(kSizes, 64);
  const TemporaryFile file;
  file.write_all(made.file);
  PositionalSource source(file.fd(), DirectIo::kOff);
  const Directory directory = read_directory(source);
  RefusingMemory memory;
  EXPECT_THROW(load_payloads(directory, source, all_of(made), memory, false, {4, 0}, no_watch), std::bad_alloc);
}

uint64_t resident_nbytes(const ExtentMemory& extent, uint64_t file_offset) {
  const auto page_nbytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> pages(extent.nbytes() / page_nbytes);
  EXPECT_EQ(mincore(extent.at(file_offset), extent.nbytes(), pages.data()), 0);
  return page_nbytes * static_cast<uint64_t>(std::count_if(pages.begin(), pages.end(), [](auto p) { return p & 1; }));
}

bool reads_past_the_page_cache(int fd) {
  try {
    PositionalSource source(fd, DirectIo::kOn);
    ExtentMemory extent(0, kMiB);
    source.read_aligned(0, extent.at(0), source.alignment());
    return source.direct_nbytes() > 0;
  } catch (const SystemError&) {
    return false;
  }
}

// Remembers its reads of the page cache and past it.
class RememberingSource final : public PositionalSource {
 public:
  struct Read {
    bool direct;
    uint64_t begin;
    uint64_t end;
  };
  RememberingSource(int fd, DirectIo direct_io) : PositionalSource(fd, direct_io), fd_(fd) {}
  std::vector<Read> reads;

 protected:
  ssize_t call_pread(int fd, char* destination, size_t nbytes, off_t offset) override {
    const auto begin = static_cast<uint64_t>(offset);
    reads.push_back({fd != fd_, begin, begin + nbytes});
    return PositionalSource::call_pread(fd, destination, nbytes, offset);
  }
  bool call_is_cached(int, uint64_t, uint64_t) override { return false; }

 private:
  const int fd_;
};

TEST(Reading, HeadersComeFirstOfRecordsInSeveralSpansAlone) {
  std::vector<size_t> sizes(200, 100000);
  sizes[7] = 5 * kMiB;
  sizes[8] = 100;
  const Made made = made_by_torch(sizes, 64);
  const TemporaryFile file;
  file.write_all(made.file);
  for (const bool direct : {false, true}) {
    if (direct && !reads_past_the_page_cache(file.fd())) GTEST_SKIP() << "no direct I/O on this file system";
    RememberingSource source(file.fd(), direct ? DirectIo::kAuto : DirectIo::kOff);
    const Directory directory = read_directory(source);
    const auto block_nbytes = std::max<uint64_t>(source.alignment(), static_cast<uint64_t>(sysconf(_SC_PAGESIZE)));
    for (const auto keep : {ReadPlan::Keep::kMemory, ReadPlan::Keep::kNothing}) {
      const ReadPlan plan(directory, all_of(made), keep, block_nbytes, kMiB);
      ASSERT_GT(plan.in_several_spans.size(), 10u);
      ASSERT_LT(plan.in_several_spans.size(), plan.spans.size());
      source.reads.clear();
      TestMemory memory;
      if (keep == ReadPlan::Keep::kMemory) {
        load_payloads(directory, source, all_of(made), memory, false, {1, kMiB}, no_watch);
      } else {
        payload_checksums(directory, source, all_of(made), {1, kMiB}, no_watch);
      }
      ASSERT_EQ(source.reads.size(), plan.in_several_spans.size() + plan.spans.size());
      for (size_t i = 0; i < source.reads.size(); ++i) {
        const RememberingSource::Read& read = source.reads[i];
        EXPECT_EQ(read.direct, direct);
        if (i < plan.in_several_spans.size()) {
          const uint64_t header = plan.records[plan.in_several_spans[i]].begin;
          EXPECT_TRUE(read.begin <= header && header < read.end && read.end - read.begin <= 2 * block_nbytes);
        } else {
          EXPECT_EQ(read.begin, plan.spans[i - plan.in_several_spans.size()].begin);
        }
      }
    }
  }
}

// Whether the kernel faults memory in when it is asked to: an emulator may say yes and do nothing.
bool kernel_faults_in() {
  ExtentMemory extent(0, kMiB);
  return extent.fault_in(0, kMiB) && resident_nbytes(extent, 0) == extent.nbytes();
}

// Where each direct read of a span waits for all the memory to be there.
class WaitingSource final : public PositionalSource {
 public:
  explicit WaitingSource(int fd) : PositionalSource(fd, DirectIo::kAuto) {}
  std::function<bool()> may_read = [] { return true; };

 protected:
  ssize_t call_pread(int fd, char* destination, size_t nbytes, off_t offset) override {
    if (nbytes < kMiB) return PositionalSource::call_pread(fd, destination, nbytes, offset);  // of a header
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!may_read() && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_TRUE(may_read());
    return PositionalSource::call_pread(fd, destination, nbytes, offset);
  }
  bool call_is_cached(int, uint64_t, uint64_t) override { return false; }
};

class MemoryThatShowsItsExtent final : public TestMemory {
 public:
  std::shared_ptr<ExtentMemory> map_extent(uint64_t file_offset, uint64_t nbytes) override {
    begin = file_offset;
    return extent = TestMemory::map_extent(file_offset, nbytes);
  }
  uint64_t begin = 0;
  std::shared_ptr<ExtentMemory> extent;
};

TEST(Reading, FaultsMemoryInAheadOfDirectReads) {
  if (!kernel_faults_in()) GTEST_SKIP() << "the kernel has no MADV_POPULATE_WRITE";
  const Made made = made_by_torch({30 * kMiB}, 64);
  const TemporaryFile file;
  file.write_all(made.file);
  if (!reads_past_the_page_cache(file.fd())) GTEST_SKIP() << "no direct I/O on this file system";
  WaitingSource source(file.fd());
  const Directory directory = read_directory(source);
  MemoryThatShowsItsExtent memory;
  source.may_read = [&] {  // the last block of a direct read may reach past the last span
    return resident_nbytes(*memory.extent, memory.begin) + source.alignment() > memory.extent->nbytes();
  };
  EXPECT_TRUE(load_payloads(directory, source, {0}, memory, true, {2, 0}, no_watch).empty());
  EXPECT_EQ(memory.payload(0), made.payloads[0]);
}

class SlowSource final : public PositionalSource {
 public:
  explicit SlowSource(int fd) : PositionalSource(fd, DirectIo::kOff) {}

 protected:
  ssize_t call_pread(int fd, char* destination, size_t nbytes, off_t offset) override {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    return PositionalSource::call_pread(fd, destination, nbytes, offset);
  }
};

class Watched : public testing::TestWithParam<size_t> {};

TEST_P(Watched, WatcherSeesProgressAndCanCancel) {
  const Made made = made_by_torch({30 * kMiB}, 64);
  const TemporaryFile file;
  file.write_all(made.file);
  SlowSource source(file.fd());
  PositionalSource sound(file.fd(), DirectIo::kOff);
  const Directory directory = read_directory(sound);
  struct Stop {};
  uint64_t seen = 0;
  int calls = 0;
  const auto stop_at_third = [&](uint64_t bytes_done, uint64_t bytes_total) {
    EXPECT_GE(bytes_done, seen);
    EXPECT_LT(bytes_done, bytes_total);
    seen = bytes_done;
    if (++calls == 3) throw Stop();
  };
  TestMemory memory;
  EXPECT_THROW(load_payloads(directory, source, {0}, memory, false, {GetParam(), 0}, stop_at_third), Stop);
  EXPECT_GT(seen, 0u);
  uint64_t left = 1;
  const auto to_the_end = [&](uint64_t bytes_done, uint64_t bytes_total) { left = bytes_total - bytes_done; };
  payload_checksums(directory, sound, {0}, {GetParam(), 0}, to_the_end);
  EXPECT_EQ(left, 0u);
}

INSTANTIATE_TEST_SUITE_P(InTheCallersThreadAndInOthers, Watched, testing::Values(1, 2));

// A plan covers what was asked for exactly once, in spans that fit a slot, and reads little else.
TEST(ReadPlan, CoversEveryRecordOnceAndLittleElse) {
  std::mt19937_64 random(11);
  for (int round = 0; round < 300; ++round) {
    std::vector<RecordSpec> specs;
    const size_t num_records = 1 + random() % 60;
    for (size_t i = 0; i < num_records; ++i) {
      const uint64_t limit = std::vector<uint64_t>{1, 1000, 100000, 20 * kMiB, 300 * kMiB}[random() % 5];
      specs.push_back({"data/" + std::to_string(i), random() % limit});
    }
    const ArchiveLayout layout("x", specs, 64);
    std::string bytes = directory_of(layout, std::vector<uint32_t>(layout.num_records(), 0));
    bytes.resize(bytes.size() - kZip64EndNbytes - kZip64LocatorNbytes - kEndNbytes);
    const Directory directory(bytes, {layout.directory_offset(), bytes.size(), layout.num_records()});
    std::vector<size_t> requested;
    for (size_t i = 0; i < layout.num_records(); ++i) {
      if (round % 2 == 0 || random() % 3 != 0) requested.push_back(i);
    }
    std::shuffle(requested.begin(), requested.end(), random);
    const auto keep = random() % 2 == 0 ? ReadPlan::Keep::kMemory : ReadPlan::Keep::kNothing;
    const uint64_t span_nbytes = random() % 2 == 0 ? kSlotNbytes : 65536;
    const ReadPlan plan(directory, requested, keep, 4096, span_nbytes);

    std::set<size_t> requests;
    uint64_t wanted_nbytes = 0;
    for (const PlannedRecord& record : plan.records) {
      EXPECT_EQ(record.record, requested[record.request]);
      EXPECT_TRUE(requests.insert(record.request).second);
      EXPECT_LE(record.begin, layout.placement(record.record).header_offset);
      EXPECT_GE(record.end, layout.placement(record.record).descriptor_offset());
      wanted_nbytes += record.end - record.begin;
    }
    EXPECT_EQ(requests.size(), requested.size());
    uint64_t total_nbytes = 0;
    std::vector<uint64_t> covered(plan.records.size(), 0);
    std::vector<size_t> num_spans(plan.records.size(), 0);
    std::vector<uint64_t> mirrored_up_to(plan.extents.size(), 0);
    for (const PlannedSpan& span : plan.spans) {
      const PlannedExtent& extent = plan.extents.at(span.extent);
      EXPECT_LT(span.begin, span.end);
      EXPECT_EQ(span.begin % 4096, 0u);
      const bool of_one_small_record =
          span.end_record - span.first_record == 1 && !plan.records[span.first_record].is_large();
      EXPECT_LE(span.end - span.begin, of_one_small_record ? kSlotNbytes : span_nbytes);
      EXPECT_GE(span.begin, extent.mirrored ? std::max(extent.begin, mirrored_up_to[span.extent]) : extent.begin);
      EXPECT_LE(span.end, extent.end);
      mirrored_up_to[span.extent] = span.end;
      total_nbytes += span.end - span.begin;
      for (size_t i = span.first_record; i < span.end_record; ++i) {
        const PlannedRecord& record = plan.records[i];
        ASSERT_LT(record.begin, span.end);
        ASSERT_GT(record.end, span.begin);
        covered[i] += std::min(span.end, record.end) - std::max(span.begin, record.begin);
        ++num_spans[i];
        EXPECT_TRUE(extent.mirrored || record.is_large() || record.end <= span.end) << "a small record is cut";
      }
    }
    EXPECT_EQ(total_nbytes, plan.nbytes);
    std::vector<size_t> in_several_spans;
    for (size_t i = 0; i < covered.size(); ++i) {
      EXPECT_EQ(covered[i], plan.records[i].end - plan.records[i].begin);
      if (num_spans[i] > 1) in_several_spans.push_back(i);
    }
    EXPECT_EQ(in_several_spans, plan.in_several_spans);
    EXPECT_LE(total_nbytes, wanted_nbytes + plan.records.size() * (64u << 10) + plan.spans.size() * 4096);
  }
}

TEST(ExtentMemory, PartsGiveTheirPagesBackEachForItself) {
  const uint64_t begin = 3 * 65536;  // a page, whatever its size
  const ExtentMemory extent(begin, 64 * kMiB);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(extent.at(begin)) % (2 * kMiB), begin);
  EXPECT_EQ(resident_nbytes(extent, begin), 0u);
  std::memset(extent.at(begin), 1, 64 * kMiB);
  EXPECT_EQ(resident_nbytes(extent, begin), 64 * kMiB);
  ExtentMemory::release(extent.at(10 * kMiB + 1), 30 * kMiB);
  EXPECT_LE(resident_nbytes(extent, begin), 34 * kMiB + 2 * 65536);
  EXPECT_EQ(*extent.at(10 * kMiB), 1);
  EXPECT_EQ(*extent.at(40 * kMiB + 2), 1);
  EXPECT_EQ(*extent.at(20 * kMiB), 0);
}

TEST(ExtentMemory, FaultingInKeepsWhatIsThere) {
  ExtentMemory extent(0, 16 * kMiB);
  *extent.at(5 * kMiB) = 1;
  if (!extent.fault_in(4 * kMiB + 1, 8 * kMiB - 1)) GTEST_SKIP() << "the kernel has no MADV_POPULATE_WRITE";
  EXPECT_GE(resident_nbytes(extent, 0), 4 * kMiB);
  EXPECT_LT(resident_nbytes(extent, 0), 16 * kMiB);
  EXPECT_EQ(*extent.at(5 * kMiB), 1);
}

TEST(ExtentMemory, OfMoreThanThereIsIsRefused) {
  EXPECT_THROW(ExtentMemory(0, uint64_t{1} << 62), std::bad_alloc);
  EXPECT_THROW(ExtentMemory(0, ~uint64_t{0} - 5000), std::bad_alloc);
}

}  // namespace
}  // namespace sdio
