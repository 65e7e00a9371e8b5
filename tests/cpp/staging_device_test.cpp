// Tensors of LibTorch on a stand-in for an accelerator (tests/device_standin/standin.cpp), through the pipeline into a
// file: the layer that sees torch, in a process without Python, so that every sanitizer and Valgrind can watch it.
#include <ATen/Functions.h>
#include <c10/core/Device.h>
#include <c10/core/DeviceType.h>
#include <c10/core/Storage.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "archive_case.h"
#include "staging/torch_device_source.h"

#if __has_include(<valgrind/memcheck.h>)
#include <valgrind/memcheck.h>
#else
#define VALGRIND_MAKE_MEM_UNDEFINED(address, nbytes) static_cast<void>(0)
#endif

extern "C" {
int64_t standin_get(const char* name);
void standin_set(const char* name, int64_t number);
void standin_drain();
void standin_reset();
}

namespace sdio {
namespace {

constexpr size_t kNumThreads = 3;

c10::Device device(c10::DeviceIndex index) { return {c10::DeviceType::PrivateUse1, index}; }

at::Tensor on_device(const std::string& bytes, c10::DeviceIndex index) {
  const auto nbytes = static_cast<int64_t>(bytes.size());
  const at::Tensor host = at::from_blob(const_cast<char*>(bytes.data()), {nbytes}, at::kByte);
  at::Tensor tensor = at::empty({nbytes}, at::TensorOptions().dtype(at::kByte).device(device(index)));
  tensor.copy_(host);
  return tensor;
}

// Every record of `made` on a device, the two in turn, except each fifth, which stays in memory.
class OnDevices {
 public:
  explicit OnDevices(const Case& made) : content_{made.content->layout, made.content->payloads, true, nullptr} {
    std::vector<DeviceBytes> records(made.bytes.size());
    for (size_t record = 0; record < made.bytes.size(); ++record) {
      if (record % 5 == 4) continue;
      records[record] = {on_device(made.bytes[record], static_cast<c10::DeviceIndex>(record % 2)).storage(), 0,
                         made.bytes[record].size()};
      content_.payloads[record].kind = Payload::Kind::kDevice;
    }
    standin_drain();
    source_ = std::make_unique<TorchDeviceSource>(std::move(records));
    content_.devices = source_.get();
  }
  const ArchiveContent& content() const { return content_; }

 private:
  ArchiveContent content_;
  std::unique_ptr<TorchDeviceSource> source_;
};

// What the slots of the next save hold.
void fill_slots(SlotPool& pool) {
  std::vector<SlotPool::Handle> slots;
  for (size_t i = 0; i < 2 * kNumThreads; ++i) {  // each worker may take a second one, to gather small pieces in
    slots.push_back(pool.acquire());
    std::memset(slots.back().data(), '\xCC', kSlotNbytes);
    static_cast<void>(VALGRIND_MAKE_MEM_UNDEFINED(slots.back().data(), kSlotNbytes));
  }
}

class Staging : public testing::Test {
 protected:
  static void SetUpTestSuite() { c10::register_privateuse1_backend("standin"); }  // before it torch pins for no one
  void SetUp() override { standin_reset(); }
  void TearDown() override { standin_reset(); }
};

std::vector<size_t> sizes() {
  std::vector<size_t> found = {3, 0, 1 << 20, 12345, 64, 200003, 128 << 10, (128 << 10) - 1};
  found.insert(found.end(), 40, 1000);  // enough to be gathered on the device
  found.insert(found.end(), {7, 4096, 300000});
  return found;
}

class Ways : public Staging, public testing::WithParamInterface<std::tuple<DirectIo, size_t>> {};

TEST_P(Ways, FileHoldsTheTensorsAndNothingOfTheSlots) {
  const auto [direct_io, region_nbytes] = GetParam();
  const Case made = make_case(sizes());
  const OnDevices devices(made);
  const std::string expected = streamed(*made.content);
  const TemporaryFile file;
  PositionalSink sink(file.fd(), direct_io);
  WriteOptions options;
  options.num_writers = kNumThreads;
  options.region_nbytes = region_nbytes;
  fill_slots(pinned_slots());
  standin_set("delay_us", 200);
  write_archive(devices.content(), sink, options, no_watch);
  EXPECT_TRUE(file.read_all() == expected);
  EXPECT_GT(standin_get("host_copies"), 0);
  EXPECT_EQ(standin_get("host_copies_to_pageable"), 0);
}

TEST_P(Ways, DeviceThatFailsIsHeardAndLeavesTheSlotsToTheNextSave) {
  const auto [direct_io, region_nbytes] = GetParam();
  const Case made = make_case(sizes());
  const OnDevices devices(made);
  WriteOptions options;
  options.num_writers = kNumThreads;
  options.region_nbytes = region_nbytes;
  for (const char* setting : {"fail_host_copy", "fail_event_synchronize"}) {
    const TemporaryFile file;
    standin_set("delay_us", 200);
    standin_set(setting, 2);
    {
      PositionalSink sink(file.fd(), direct_io);
      EXPECT_THROW(write_archive(devices.content(), sink, options, no_watch), c10::Error) << setting;
    }
    EXPECT_EQ(standin_get("host_copies_in_flight"), 0) << setting;
    standin_set("delay_us", 0);
    PositionalSink sink(file.fd(), direct_io);
    fill_slots(pinned_slots());
    write_archive(devices.content(), sink, options, no_watch);
    EXPECT_TRUE(file.read_all() == streamed(*made.content)) << setting;
  }
}

INSTANTIATE_TEST_SUITE_P(Regions, Ways,
                         testing::Combine(testing::Values(DirectIo::kOff, DirectIo::kAuto),
                                          testing::Values<size_t>(65536, 0)));

TEST_F(Staging, SavesAtOnceShareThePinnedSlots) {
  const Case made = make_case(sizes());
  const std::string expected = streamed(*made.content);
  std::vector<std::thread> savers;
  for (int saver = 0; saver < 3; ++saver) {
    savers.emplace_back([&] {
      const OnDevices devices(made);
      const TemporaryFile file;
      PositionalSink sink(file.fd(), DirectIo::kAuto);
      write_archive(devices.content(), sink, {}, no_watch);
      EXPECT_TRUE(file.read_all() == expected);
    });
  }
  for (std::thread& saver : savers) saver.join();
}

TEST_F(Staging, MemoryThatCannotBePinnedServesToo) {
  standin_set("pinned_memory", 0);
  pinned_slots().release_idle();
  const Case made = make_case(sizes());
  const OnDevices devices(made);
  fill_slots(pinned_slots());
  EXPECT_TRUE(streamed(devices.content()) == streamed(*made.content));
  pinned_slots().release_idle();
}

}  // namespace
}  // namespace sdio
