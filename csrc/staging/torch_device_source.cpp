#include "staging/torch_device_source.h"

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <pthread.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <utility>

#include "staging/raw_bytes.h"
#include "staging/side_stream.h"

namespace sdio {
namespace {

// One copy command costs some microseconds whatever its size: smaller pieces are gathered on the device first.
constexpr uint64_t kBatchBelowNbytes = 128u << 10;
constexpr size_t kBatchAtLeast = 8;
constexpr size_t kMaxIdlePinnedSlots = 16;

class PinnedMemory final : public SlotMemory {
 public:
  explicit PinnedMemory(at::Tensor bytes) : bytes_(std::move(bytes)) { data_ = static_cast<char*>(bytes_.data_ptr()); }

 private:
  at::Tensor bytes_;
};

class PinnedAllocator final : public SlotAllocator {
 public:
  std::unique_ptr<SlotMemory> allocate() override {
    try {
      const PlainDispatch plain;
      at::Tensor bytes = at::empty({static_cast<int64_t>(kSlotNbytes)},
                                   at::TensorOptions().dtype(at::kByte).device(at::kCPU).pinned_memory(true));
      const bool page_aligned = reinterpret_cast<uintptr_t>(bytes.data_ptr()) % 4096 == 0;  // direct I/O asks for it
      if (page_aligned) return std::make_unique<PinnedMemory>(std::move(bytes));
    } catch (const c10::Error&) {  // an accelerator without pinned memory
    }
    return HugePageAllocator().allocate();
  }
};

// Waits for the stream where the event that covers its copies is not waited for: after a failure, copies queued before
// it would still land in slots that other saves have by then.
class LandsOnFailure {
 public:
  explicit LandsOnFailure(const c10::Stream& stream) : stream_(stream) {}
  LandsOnFailure(const LandsOnFailure&) = delete;
  LandsOnFailure& operator=(const LandsOnFailure&) = delete;
  ~LandsOnFailure() {
    if (landed_) return;
    try {
      stream_.synchronize();
    } catch (...) {  // a lost device copies nothing any more; the first error is the one to report
    }
  }
  void landed() { landed_ = true; }

 private:
  const c10::Stream stream_;
  bool landed_ = false;
};

bool belongs_to_batch(const DevicePiece& piece) { return piece.nbytes < kBatchBelowNbytes; }

// Never destroyed: pinned memory must not be freed after the driver has shut down.
SlotPool* pinned_pool = nullptr;
SlotPool* pinned_snapshot_pool = nullptr;

void start_pinned_pools() {
  pinned_pool = new SlotPool(std::make_unique<PinnedAllocator>(), kMaxIdlePinnedSlots);
  pinned_snapshot_pool = new SlotPool(std::make_unique<PinnedAllocator>(), std::numeric_limits<size_t>::max());
}

void start_pinned_pools_once() {
  static const bool started = [] {
    start_pinned_pools();
    pthread_atfork(nullptr, nullptr, start_pinned_pools);  // as SlotPool::host(): a lock may be held at fork()
    return true;
  }();
  static_cast<void>(started);
}

}  // namespace

TorchDeviceSource::TorchDeviceSource(std::vector<DeviceBytes> records) : records_(std::move(records)) {
  for (const DeviceBytes& bytes : records_) {
    if (!bytes.storage || side_streams_.count(bytes.storage.device()) != 0) continue;
    side_streams_.emplace(bytes.storage.device(), side_stream_after_current(bytes.storage.device()));
  }
}

SlotPool& TorchDeviceSource::slots() { return pinned_slots(); }

void TorchDeviceSource::copy(const std::vector<DevicePiece>& pieces) {
  const PlainDispatch plain;
  if (side_streams_.size() == 1) return copy_from_device(side_streams_.begin()->first, pieces);
  for (const auto& device_and_stream : side_streams_) {
    std::vector<DevicePiece> of_device;
    for (const DevicePiece& piece : pieces) {
      if (records_[piece.record].storage.device() == device_and_stream.first) of_device.push_back(piece);
    }
    if (!of_device.empty()) copy_from_device(device_and_stream.first, of_device);
  }
}

void TorchDeviceSource::copy_from_device(c10::Device device, const std::vector<DevicePiece>& pieces) {
  const c10::Stream side = side_streams_.at(device);
  const c10::StreamGuard on_side_stream(side);
  std::vector<at::Tensor> small;
  at::Tensor gathered;  // this and the next must live until the copy between them has finished
  std::optional<SlotPool::Handle> bounce;
  LandsOnFailure copies(side);
  for (const DevicePiece& piece : pieces) {
    const DeviceBytes& record = records_[piece.record];
    const at::Tensor source = device_bytes(record.storage, record.offset + piece.record_offset, piece.nbytes);
    if (belongs_to_batch(piece)) {
      small.push_back(source);
    } else {
      host_bytes(piece.destination, piece.nbytes).copy_(source, /*non_blocking=*/true);
    }
  }
  if (small.size() >= kBatchAtLeast) {
    try {
      bounce.emplace(slots().acquire());
    } catch (const std::bad_alloc&) {  // a copy each, then
    }
  }
  const bool batched = bounce.has_value();
  if (batched) {
    gathered = at::cat(small);
    host_bytes(bounce->data(), static_cast<uint64_t>(gathered.numel())).copy_(gathered, /*non_blocking=*/true);
  } else {
    auto next = small.begin();
    for (const DevicePiece& piece : pieces) {
      if (belongs_to_batch(piece)) host_bytes(piece.destination, piece.nbytes).copy_(*next++, /*non_blocking=*/true);
    }
  }
  c10::Event landed(device.type());
  landed.record(side);
  landed.synchronize();
  copies.landed();
  if (batched) {
    const char* next = bounce->data();
    for (const DevicePiece& piece : pieces) {
      if (!belongs_to_batch(piece)) continue;
      std::memcpy(piece.destination, next, piece.nbytes);
      next += piece.nbytes;
    }
  }
}

SlotPool& pinned_slots() {
  start_pinned_pools_once();
  return *pinned_pool;
}

SlotPool& pinned_snapshot_slots() {
  start_pinned_pools_once();
  return *pinned_snapshot_pool;
}

}  // namespace sdio
