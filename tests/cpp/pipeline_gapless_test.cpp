// Files of payloads alone, and the SHA-256 of files of both kinds: written in parallel, streamed, from a snapshot.
#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "archive_case.h"
#include "checksum/sha256.h"
#include "pipeline/write/file_digest.h"

namespace sdio {
namespace {

Case make_gapless(const std::vector<size_t>& sizes, On on) {
  Case made = make_case(sizes, 64, on);
  made.records->layout = std::make_shared<const FileLayout>(std::vector<uint64_t>(sizes.begin(), sizes.end()));
  return made;
}

std::string joined(const Case& made) {
  std::string all;
  for (const std::string& bytes : made.bytes) all += bytes;
  return all;
}

Sha256::Sum sum_of(const std::string& bytes) {
  Sha256 hash;
  hash.update(bytes.data(), bytes.size());
  return hash.finish();
}

class Gapless : public testing::TestWithParam<std::tuple<DirectIo, size_t, size_t, On>> {};

TEST_P(Gapless, PayloadsOneBehindTheOther) {
  const auto [direct_io, num_threads, region_nbytes, on] = GetParam();
  const Case made = make_gapless(kSizes, on);
  const TemporaryFile file;
  PositionalSink sink(file.fd(), direct_io);
  FileDigest digest;
  WriteOptions options;
  options.num_writers = num_threads;
  options.region_nbytes = region_nbytes;
  options.digest = &digest;
  write_archive(*made.records, sink, options, no_watch);
  const std::string expected = joined(made);
  EXPECT_TRUE(file.read_all() == expected);
  EXPECT_TRUE(streamed(*made.records) == expected);
  EXPECT_EQ(digest.finish(), sum_of(expected));
}

TEST_P(Gapless, TheDigestOfAnArchive) {
  const auto [direct_io, num_threads, region_nbytes, on] = GetParam();
  Case made = make_case({3, 0, 20 << 20, 12345, 9 << 20}, 64, on);
  made.records->payloads[2].kind = Payload::Kind::kHole;
  const TemporaryFile file;
  PositionalSink sink(file.fd(), direct_io);
  FileDigest digest;
  WriteOptions options;
  options.num_writers = num_threads;
  options.region_nbytes = region_nbytes;
  options.digest = &digest;
  write_archive(*made.records, sink, options, no_watch);
  EXPECT_EQ(digest.finish(), sum_of(file.read_all()));
}

INSTANTIATE_TEST_SUITE_P(Ways, Gapless,
                         testing::Values(std::make_tuple(DirectIo::kOff, 0, 0, On::kMemory),
                                         std::make_tuple(DirectIo::kOff, 4, 4096, On::kMemory),
                                         std::make_tuple(DirectIo::kAuto, 0, 0, On::kMemory),
                                         std::make_tuple(DirectIo::kAuto, 8, 65536, On::kMixed),
                                         std::make_tuple(DirectIo::kAuto, 4, 1 << 20, On::kDevice)));

TEST(GaplessSnapshot, HasTheBytesAndTheirSum) {
  for (const bool gapless : {true, false}) {
    Case made = gapless ? make_gapless(kSizes, On::kMixed) : make_case(kSizes, 64, On::kMixed);
    made.records->payloads[5].kind = Payload::Kind::kHole;
    const std::string expected = streamed(*made.records);
    HostSnapshot snapshot(*made.records, SlotPool::host(), no_watch);
    const TemporaryFile file;
    PositionalSink sink(file.fd(), DirectIo::kAuto);
    FileDigest digest;
    WriteOptions options;
    options.digest = &digest;
    write_snapshot(snapshot, sink, options, no_watch);
    EXPECT_TRUE(file.read_all() == expected);
    EXPECT_EQ(digest.finish(), sum_of(expected));
  }
}

TEST(FileLayout, RefusesWhatNoFileCanHold) {
  EXPECT_THROW(FileLayout({uint64_t{1} << 61, uint64_t{1} << 61, 1}), std::invalid_argument);
  EXPECT_THROW(FileLayout({~uint64_t{0}}), std::invalid_argument);
  EXPECT_EQ(FileLayout(std::vector<uint64_t>{}).file_nbytes(), 0u);
}

TEST(FileDigest, WhoWaitsForItsTurnIsCancelled) {
  FileDigest digest;
  std::thread waiting([&] { EXPECT_THROW(digest.add(1, {}, 5, nullptr), Cancelled); });
  digest.cancel();
  waiting.join();
}

}  // namespace
}  // namespace sdio
