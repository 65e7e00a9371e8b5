// Tensors of LibTorch on a stand-in for an accelerator (tests/device_standin/standin.cpp), through the functions of a
// _torch module and the pipeline into a file and back: in a process without Python, so that every sanitizer and
// Valgrind can watch it.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/Device.h>
#include <c10/core/DeviceType.h>
#include <c10/core/Storage.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "archive_case.h"
#include "pipeline/read/payload_reader.h"
#include "pipeline/read/single_reads.h"
#include "table_devices.h"
#include "torch/functions.h"
#include "torch/raw_bytes.h"

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

// What the tests that lose a wait on purpose have is a data race, at which ThreadSanitizer ends.
#ifdef __SANITIZE_THREAD__
constexpr bool kMayLoseWaits = false;
#else
constexpr bool kMayLoseWaits = true;
#endif

TableDevices& devices() {
  static auto& table = *new TableDevices(device_functions());
  return table;
}

c10::Device device(c10::DeviceIndex index) { return {c10::DeviceType::PrivateUse1, index}; }

at::Tensor on_device(const std::string& bytes, c10::DeviceIndex index) {
  const auto nbytes = static_cast<int64_t>(bytes.size());
  const at::Tensor host = at::from_blob(const_cast<char*>(bytes.data()), {nbytes}, at::kByte);
  at::Tensor tensor = at::empty({nbytes}, at::TensorOptions().dtype(at::kByte).device(device(index)));
  tensor.copy_(host);
  return tensor;
}

// The bytes of a storage, copied in order on the calling thread's current stream.
std::string bytes_of(const sdio_device_bytes& bytes) {
  std::string found(bytes.nbytes, '\0');
  host_bytes(&found[0], bytes.nbytes).copy_(device_bytes(shared(bytes.storage), bytes.offset, bytes.nbytes));
  return found;
}

sdio_device_bytes all_of(const at::Tensor& tensor) {
  return {handle_of(tensor.storage()), 0, tensor.storage().nbytes()};
}

// Every record of `made` on a device, the two in turn, except each fifth, which stays in memory.
class OnDevices {
 public:
  explicit OnDevices(const Case& made) : records_{made.records->layout, made.records->payloads, true, nullptr} {
    std::vector<at::Tensor> tensors;  // until the source has its own hold of them
    std::vector<sdio_device_bytes> records(made.bytes.size());
    for (size_t record = 0; record < made.bytes.size(); ++record) {
      if (record % 5 == 4) continue;
      tensors.push_back(on_device(made.bytes[record], static_cast<c10::DeviceIndex>(record % 2)));
      records[record] = all_of(tensors.back());
      records_.payloads[record].kind = Payload::Kind::kDevice;
    }
    standin_drain();
    source_ = std::make_unique<TableSource>(devices(), records);
    records_.devices = source_.get();
  }
  const Records& records() const { return records_; }

 private:
  Records records_;
  std::unique_ptr<TableSource> source_;
};

// What the slots of the next save hold.
void fill_slots() {
  std::vector<SlotPool::Handle> slots;
  for (size_t i = 0; i < 2 * kNumThreads; ++i) {  // each worker takes a second one, to gather small pieces in
    slots.push_back(devices().pinned.acquire());
    std::memset(slots.back().data(), '\xCC', kSlotNbytes);
    static_cast<void>(VALGRIND_MAKE_MEM_UNDEFINED(slots.back().data(), kSlotNbytes));
  }
}

class Torch : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    static const bool registered = [] {
      c10::register_privateuse1_backend("standin");  // before it torch pins for no one
      return true;
    }();
    static_cast<void>(registered);
  }
  void SetUp() override { standin_reset(); }
  void TearDown() override { standin_reset(); }
};

std::vector<size_t> sizes() {
  std::vector<size_t> found = {3, 0, 1 << 20, 12345, 64, 200003, 128 << 10, (128 << 10) - 1};
  found.insert(found.end(), 40, 1000);  // enough to be gathered on the device
  found.insert(found.end(), {7, 4096, 300000});
  return found;
}

class Ways : public Torch, public testing::WithParamInterface<std::tuple<DirectIo, size_t>> {
 protected:
  static WriteOptions options() {
    WriteOptions chosen;
    chosen.num_writers = kNumThreads;
    chosen.region_nbytes = std::get<1>(GetParam());
    return chosen;
  }
  static std::string written(const Records& records) {
    const TemporaryFile file;
    PositionalSink sink(file.fd(), std::get<0>(GetParam()));
    write_archive(records, sink, options(), no_watch);
    return file.read_all();
  }
};

TEST_P(Ways, FileHoldsTheTensorsAndNothingOfTheSlots) {
  const Case made = make_case(sizes());
  const OnDevices on_devices(made);
  fill_slots();
  standin_set("delay_us", 200);
  EXPECT_TRUE(written(on_devices.records()) == streamed(*made.records));
  EXPECT_GT(standin_get("host_copies"), 0);
  EXPECT_GT(standin_get("gathers"), 0);
  EXPECT_EQ(standin_get("host_copies_to_pageable"), 0);
}

TEST_P(Ways, DeviceThatFailsIsHeardAndLeavesTheSlotsToTheNextSave) {
  const Case made = make_case(sizes());
  const OnDevices on_devices(made);
  for (const char* setting : {"fail_host_copy", "fail_event_synchronize"}) {
    standin_set("delay_us", 200);
    standin_set(setting, 2);
    try {
      written(on_devices.records());
      ADD_FAILURE() << setting << " was not heard of";
    } catch (const DeviceError& e) {
      EXPECT_EQ(e.status, SDIO_FAILED);
      EXPECT_EQ(std::string(e.what()).find("standin: the "), 0u) << e.what();
    }
    EXPECT_EQ(standin_get("host_copies_in_flight"), 0) << setting;
    standin_set("delay_us", 0);
    fill_slots();
    EXPECT_TRUE(written(on_devices.records()) == streamed(*made.records)) << setting;
  }
}

TEST_P(Ways, WithoutRoomToGatherPiecesAreCopiedOneByOne) {
  const Case made = make_case(sizes());
  const OnDevices on_devices(made);
  fill_slots();
  standin_set("delay_us", 200);
  standin_set("fail_allocation", 1);
  EXPECT_TRUE(written(on_devices.records()) == streamed(*made.records));
  EXPECT_EQ(standin_get("fail_allocation"), 0);
}

INSTANTIATE_TEST_SUITE_P(Regions, Ways,
                         testing::Combine(testing::Values(DirectIo::kOff, DirectIo::kAuto),
                                          testing::Values<size_t>(65536, 0)));

TEST_F(Torch, SavesAtOnceShareThePinnedSlots) {
  const Case made = make_case(sizes());
  const std::string expected = streamed(*made.records);
  std::vector<std::thread> savers;
  for (int saver = 0; saver < 3; ++saver) {
    savers.emplace_back([&] {
      const OnDevices on_devices(made);
      const TemporaryFile file;
      PositionalSink sink(file.fd(), DirectIo::kAuto);
      write_archive(on_devices.records(), sink, {}, no_watch);
      EXPECT_TRUE(file.read_all() == expected);
    });
  }
  for (std::thread& saver : savers) saver.join();
}

TEST_F(Torch, MemoryThatCannotBePinnedServesToo) {
  for (const int setting : {0, 2}) {  // none, not page-aligned
    standin_set("pinned_memory", setting);
    devices().pinned.release_idle();
    char* data = nullptr;
    EXPECT_EQ(devices().functions.pin(kSlotNbytes, &data), nullptr);
    const Case made = make_case(sizes());
    const OnDevices on_devices(made);
    fill_slots();
    EXPECT_TRUE(streamed(on_devices.records()) == streamed(*made.records));
    devices().pinned.release_idle();
  }
}

// ---- the stand-in can tell: without a wait the bytes are wrong

TEST_F(Torch, WithoutWaitingForEventsTheFileDiffers) {
  if (!kMayLoseWaits) GTEST_SKIP() << "a data race, on purpose";
  const Case made = make_case(sizes());
  const OnDevices on_devices(made);
  fill_slots();
  standin_set("delay_us", 20000);
  standin_set("lose_event_synchronize", 1);
  EXPECT_FALSE(streamed(on_devices.records()) == streamed(*made.records));
}

// A record whose values the device has yet to write when the source is made.
std::string copied_behind_a_late_fill() {
  at::Tensor tensor = on_device(std::string(300000, '\1'), 1);
  standin_drain();
  standin_set("delay_us", 50000);
  tensor.fill_(7);
  standin_set("delay_us", 0);
  TableSource source(devices(), {all_of(tensor)});
  const SlotPool::Handle slot = devices().pinned.acquire();
  source.copy({{0, 0, 300000, slot.data()}});
  return {slot.data(), 300000};
}

TEST_F(Torch, CopiesComeAfterWhatTheCallersStreamHadQueued) {
  EXPECT_TRUE(copied_behind_a_late_fill() == std::string(300000, '\7'));
  if (!kMayLoseWaits) return;
  standin_set("lose_event_block", 1);
  EXPECT_FALSE(copied_behind_a_late_fill() == std::string(300000, '\7'));
}

// ---- onto a device

class Loading : public Torch {
 protected:
  Loading() : made_(make_case(sizes())) {
    file_.write_all(streamed(*made_.records));
    source_ = std::make_unique<PositionalSource>(file_.fd(), DirectIo::kAuto);
    directory_ = std::make_unique<Directory>(read_directory(*source_));
    for (size_t record = 0; record < made_.bytes.size(); ++record) {
      records_.push_back(record);
      sizes_.push_back(made_.bytes[record].size());
    }
  }

  std::vector<size_t> load_onto(TableDestination& destination) {
    return load_payloads_onto(*directory_, *source_, records_, destination, true, {kNumThreads, 65536},
                              [](uint64_t, uint64_t) {});
  }

  // Copied back on another stream than that of the load, which the caller need not wait for.
  bool holds_all(const TableDestination& destination) const {
    for (size_t record = 0; record < records_.size(); ++record) {
      const sdio_storage* const storage = destination_storage_handle(destination.handle(), record);
      if (bytes_of({storage, 0, sizes_[record]}) != made_.bytes[record]) return false;
    }
    return true;
  }

  const Case made_;
  const TemporaryFile file_;
  std::unique_ptr<PositionalSource> source_;
  std::unique_ptr<Directory> directory_;
  std::vector<size_t> records_;
  std::vector<uint64_t> sizes_;
};

TEST_F(Loading, PutsEveryPayloadOntoTheDevice) {
  standin_set("delay_us", 200);
  TableDestination destination(devices(), "standin:1", sizes_);
  EXPECT_EQ(load_onto(destination), std::vector<size_t>());
  EXPECT_EQ(standin_get("device_copies_in_flight"), 0);
  EXPECT_EQ(standin_get("blocking_copies"), 0);
  EXPECT_TRUE(holds_all(destination));
  EXPECT_EQ(standin_get("streams_taken:0"), 0);
}

TEST_F(Loading, WithoutWaitingForEventsTheBytesDiffer) {
  if (!kMayLoseWaits) GTEST_SKIP() << "a data race, on purpose";
  TableDestination destination(devices(), "standin:1", sizes_);
  fill_slots();
  standin_set("delay_us", 2000);
  standin_set("lose_event_synchronize", 1);
  load_onto(destination);
  standin_drain();
  EXPECT_FALSE(holds_all(destination));
}

TEST_F(Loading, CopiesComeAfterWhatTheMemoryWasUsedForBefore) {
  for (const int lose : {0, 1}) {
    if (lose == 1 && !kMayLoseWaits) continue;
    standin_reset();
    at::Tensor old =
        at::empty({static_cast<int64_t>(sizes_[2])}, at::TensorOptions().dtype(at::kByte).device(device(0)));
    standin_set("delay_us", 300000);
    old.fill_(1);
    standin_set("delay_us", 0);
    old.reset();
    standin_set("lose_event_block", lose);
    TableDestination destination(devices(), "standin:0", sizes_);
    load_onto(destination);
    standin_drain();
    EXPECT_EQ(holds_all(destination), lose == 0);
  }
}

TEST_F(Loading, DeviceThatFailsIsHeardAndNothingIsUnderWay) {
  for (const char* setting : {"fail_device_copy", "fail_event_synchronize"}) {
    standin_reset();
    standin_set("delay_us", 2000);
    standin_set(setting, 3);
    {
      TableDestination destination(devices(), "standin:0", sizes_);
      EXPECT_THROW(load_onto(destination), DeviceError) << setting;
      EXPECT_EQ(standin_get("device_copies_in_flight"), 0) << setting;
    }
    TableDestination destination(devices(), "standin:0", sizes_);
    load_onto(destination);
    EXPECT_TRUE(holds_all(destination)) << setting;
  }
}

TEST_F(Loading, CopiesThatNobodyWaitedForHaveLandedWhenTheyAreDeleted) {
  TableDestination destination(devices(), "standin:0", {300000});
  const SlotPool::Handle slot = devices().pinned.acquire();
  std::memset(slot.data(), 5, 300000);
  standin_set("delay_us", 50000);
  destination.copy({{0, 0, 300000, slot.data()}});
  EXPECT_EQ(standin_get("device_copies_in_flight"), 0);
  std::memset(slot.data(), 6, 300000);
  EXPECT_TRUE(bytes_of({destination_storage_handle(destination.handle(), 0), 0, 300000}) == std::string(300000, '\5'));
}

// ---- clones

struct Clones {
  explicit Clones(const std::vector<sdio_device_bytes>& originals)
      : made(devices().functions.clones_new(originals.data(), originals.size(), &status, &error)) {}
  ~Clones() { devices().functions.clones_delete(made); }
  sdio_status status = SDIO_OK;
  sdio_error error = {};
  sdio_clones* const made;
};

TEST_F(Torch, ClonesAreTheValuesAtTheCall) {
  const sdio_torch_functions& functions = devices().functions;
  std::vector<at::Tensor> tensors;
  std::vector<sdio_device_bytes> originals;
  for (const size_t nbytes : sizes()) {
    const size_t number = tensors.size();
    tensors.push_back(
        on_device(std::string(nbytes, static_cast<char>(number)), static_cast<c10::DeviceIndex>(number % 2)));
    originals.push_back(number % 5 == 4 ? sdio_device_bytes{} : all_of(tensors.back()));
  }
  standin_drain();
  standin_set("delay_us", 1000);
  const Clones clones(originals);
  ASSERT_NE(clones.made, nullptr) << clones.error.message;
  EXPECT_EQ(functions.clones_done(clones.made), 0);
  for (at::Tensor& tensor : tensors) tensor.fill_(99);
  sdio_error error = {};
  EXPECT_EQ(functions.clones_wait(clones.made, &error), SDIO_OK);
  EXPECT_EQ(functions.clones_done(clones.made), 1);
  EXPECT_LT(standin_get("gathers"), 3);
  standin_drain();
  for (size_t record = 0; record < originals.size(); ++record) {
    const sdio_device_bytes clone = functions.clones_of(clones.made, record);
    EXPECT_EQ(clone.nbytes, originals[record].nbytes);
    if (clone.nbytes == 0) continue;
    EXPECT_NE(clone.storage, originals[record].storage);
    EXPECT_TRUE(bytes_of(clone) == std::string(clone.nbytes, static_cast<char>(record))) << record;
  }
}

// ---- statuses

TEST_F(Torch, RefusalsAreStatuses) {
  const sdio_torch_functions& functions = devices().functions;
  const at::Tensor tensor = on_device(std::string(300000, '\1'), 0);
  const sdio_device_bytes record = all_of(tensor);
  const uint64_t nbytes = 300000;
  sdio_error error = {};
  sdio_status status = SDIO_OK;

  standin_set("no_streams", 1);
  EXPECT_EQ(functions.source_new(&record, 1, &status, &error), nullptr);
  EXPECT_EQ(status, SDIO_UNSUPPORTED);
  EXPECT_STREQ(error.message, "standin: there are no streams");
  EXPECT_EQ(functions.destination_new("standin:0", &nbytes, 1, &status, &error), nullptr);
  EXPECT_EQ(status, SDIO_UNSUPPORTED);
  standin_set("no_streams", 0);

  standin_set("fail_allocation", 1);
  EXPECT_EQ(functions.destination_new("standin:0", &nbytes, 1, &status, &error), nullptr);
  EXPECT_EQ(status, SDIO_NO_MEMORY);
  EXPECT_STREQ(error.message, "standin: out of memory");
  standin_set("fail_allocation", 1);
  const Clones clones({record});
  EXPECT_EQ(clones.made, nullptr);
  EXPECT_EQ(clones.status, SDIO_NO_MEMORY);

  EXPECT_EQ(functions.destination_new("no such device", &nbytes, 1, &status, &error), nullptr);
  EXPECT_EQ(status, SDIO_UNSUPPORTED);
  EXPECT_GT(std::strlen(error.message), 10u);
}

TEST_F(Torch, StorageHandlesAreOwners) {
  at::Tensor tensor = on_device("abc", 0);
  const c10::Storage storage = tensor.storage();
  tensor.reset();
  const size_t before = storage.use_count();
  sdio_storage* const handle = devices().functions.storage_retain(handle_of(storage));
  EXPECT_EQ(storage.use_count(), before + 1);
  std::thread([&] { devices().functions.storage_release(handle); }).join();
  EXPECT_EQ(storage.use_count(), before);
}

TEST_F(Torch, StepsAreNotRecordedWhereNobodyProfiles) {
  const sdio_torch_functions& functions = devices().functions;
  EXPECT_EQ(functions.step_begin("statedict_io::write"), nullptr);
  functions.step_end(nullptr);
  sdio_recording* const recording = functions.recording_of_this_thread();
  std::thread([&] { functions.recording_continue(recording); }).join();
  functions.recording_delete(recording);
}

}  // namespace
}  // namespace sdio
