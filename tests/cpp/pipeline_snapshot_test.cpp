// Snapshots and copies of payloads against the stream of the archive they were taken of, after its payloads have
// changed; the pools that they come from; the pace of writing.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "archive_case.h"
#include "file/system_error.h"
#include "pipeline/write/archive_writer.h"
#include "pipeline/write/host_snapshot.h"
#include "pipeline/write/payload_copies.h"
#include "pipeline/write/write_pace.h"

namespace sdio {
namespace {

using Clock = std::chrono::steady_clock;

void overwrite(Case& made) {
  for (std::string& bytes : made.bytes) std::fill(bytes.begin(), bytes.end(), '\x55');
}

class Snapshots : public testing::TestWithParam<std::tuple<DirectIo, size_t, On>> {};

TEST_P(Snapshots, KeepsTheBytesThatWereThere) {
  const auto [direct_io, num_threads, on] = GetParam();
  Case made = make_case(kSizes, 64, on);
  const std::string expected = streamed(*made.records);
  SlotPool slots(std::make_unique<HugePageAllocator>(), 1000);
  HostSnapshot snapshot(*made.records, slots, no_watch);
  EXPECT_EQ(slots.nbytes(), HostSnapshot::nbytes_of(*made.records));
  EXPECT_EQ(slots.idle_nbytes(), 0u);
  overwrite(made);
  for (int time = 0; time < 2; ++time) {  // where the first try is refused, there is a second
    const TemporaryFile file;
    PositionalSink sink(file.fd(), direct_io);
    WriteOptions options;
    options.num_writers = num_threads;
    write_snapshot(snapshot, sink, options, no_watch);
    EXPECT_TRUE(file.read_all() == expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Ways, Snapshots,
                         testing::Values(std::make_tuple(DirectIo::kOff, 1, On::kMemory),
                                         std::make_tuple(DirectIo::kOff, 3, On::kMixed),
                                         std::make_tuple(DirectIo::kAuto, 4, On::kMemory),
                                         std::make_tuple(DirectIo::kAuto, 4, On::kDevice)));

TEST(Snapshots, StreamsTheSameBytes) {
  Case made = make_case({100, 9 << 20, 30 << 20, 5});
  made.records->payloads[2].kind = Payload::Kind::kHole;
  const std::string expected = streamed(*made.records);
  SlotPool slots(std::make_unique<HugePageAllocator>(), 1000);
  HostSnapshot snapshot(*made.records, slots, no_watch);
  EXPECT_LT(slots.nbytes(), made.records->layout->file_nbytes());  // holes take no memory
  overwrite(made);
  std::string all;
  stream_snapshot(snapshot, [&](const char* bytes, size_t nbytes) { all.append(bytes, nbytes); }, no_watch);
  EXPECT_TRUE(all == expected);
}

TEST(Snapshots, PaddingCarriesNoBytesOfAnEarlierSave) {
  const Case secret = make_case({8 << 20});
  const Case tiny = make_case({1});
  SlotPool slots(std::make_unique<HugePageAllocator>(), 1000);
  for (const Case* made : {&secret, &tiny}) {
    const TemporaryFile file;
    PositionalSink sink(file.fd(), DirectIo::kAuto);
    HostSnapshot snapshot(*made->records, slots, no_watch);
    write_snapshot(snapshot, sink, {}, no_watch);
    EXPECT_TRUE(file.read_all() == streamed(*made->records));
  }
}

TEST(Snapshots, CancelledGivesItsSlotsBack) {
  const Case made = make_case({40 << 20}, 64, On::kDevice);
  made.device->lateness = std::chrono::milliseconds(200);  // the watcher is asked every 50
  SlotPool slots(std::make_unique<HugePageAllocator>(), 1000);
  struct Stop {};
  EXPECT_THROW(HostSnapshot(*made.records, slots, [](uint64_t) { throw Stop(); }), Stop);
  EXPECT_EQ(slots.idle_nbytes(), slots.nbytes());
}

TEST(Copies, KeepsTheBytesThatWereThere) {
  Case made = make_case(kSizes);
  const std::string expected = streamed(*made.records);
  std::vector<HostBytes> sources;
  for (const std::string& bytes : made.bytes) sources.push_back({bytes.data(), bytes.size()});
  SlotPool slots(std::make_unique<HugePageAllocator>(), 1000);
  const PayloadCopies copies(sources, slots, no_watch);
  EXPECT_EQ(slots.nbytes(), PayloadCopies::nbytes_of(sources));
  made.records->copies = &copies;
  for (size_t i = 0; i < sources.size(); ++i) {
    made.records->payloads[i].kind = Payload::Kind::kCopied;
    made.records->payloads[i].copy = i;
  }
  overwrite(made);
  EXPECT_TRUE(streamed(*made.records) == expected);
  for (const DirectIo direct_io : {DirectIo::kOff, DirectIo::kAuto}) {
    const TemporaryFile file;
    PositionalSink sink(file.fd(), direct_io);
    write_archive(*made.records, sink, {}, no_watch);
    EXPECT_TRUE(file.read_all() == expected);
  }
}

TEST(Copies, OfNothingTakesNothing) {
  SlotPool slots(std::make_unique<HugePageAllocator>(), 1000);
  const PayloadCopies copies({{nullptr, 0}, {nullptr, 0}}, slots, no_watch);
  EXPECT_EQ(slots.nbytes(), 0u);
}

TEST(Slots, TrimGivesBackIdleOnesOnly) {
  SlotPool slots(std::make_unique<HugePageAllocator>(), 1000);
  const SlotPool::Handle used = slots.acquire();
  {
    const SlotPool::Handle second = slots.acquire();
    const SlotPool::Handle third = slots.acquire();
  }
  EXPECT_EQ(slots.nbytes(), 3 * kSlotNbytes);
  slots.trim(2 * kSlotNbytes + 1);
  EXPECT_EQ(slots.nbytes(), 2 * kSlotNbytes);
  slots.trim(0);
  EXPECT_EQ(slots.nbytes(), kSlotNbytes);
  EXPECT_EQ(slots.idle_nbytes(), 0u);
}

TEST(Pace, IsKeptByAllThreadsTogether) {
  WritePace pace(1e6);
  const auto start = Clock::now();
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back([&] { pace.wait_for(50'000); });
  for (std::thread& thread : threads) thread.join();
  EXPECT_GE(Clock::now() - start, std::chrono::milliseconds(200));
}

TEST(Pace, CancelWakesWhoWaits) {
  WritePace pace(1);
  std::thread waiting([&] { pace.wait_for(1'000'000); });
  pace.cancel();
  waiting.join();
}

TEST(Pace, OfNothingIsNone) { WritePace(0).wait_for(uint64_t{1} << 60); }

}  // namespace
}  // namespace sdio
