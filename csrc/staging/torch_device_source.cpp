#include "staging/torch_device_source.h"

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pthread.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

namespace sdio {
namespace {

// One copy command costs some microseconds whatever its size: smaller pieces are gathered on the device first.
constexpr uint64_t kBatchBelowNbytes = 128u << 10;
constexpr size_t kBatchAtLeast = 8;
constexpr size_t kMaxIdlePinnedSlots = 16;

// Pieces are copied as bytes, below autograd and below any Python dispatch mode of the calling thread.
class PlainDispatch {
 private:
  c10::InferenceMode inference_mode_;
  c10::impl::ExcludeDispatchKeyGuard no_python_{
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot})};
};

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

at::Tensor device_bytes(const c10::Storage& storage, uint64_t offset, uint64_t nbytes) {
  return at::empty({0}, at::TensorOptions().dtype(at::kByte).device(storage.device()))
      .set_(storage, static_cast<int64_t>(offset), {static_cast<int64_t>(nbytes)}, {1});
}

at::Tensor host_bytes(char* data, uint64_t nbytes) {
  return at::from_blob(data, {static_cast<int64_t>(nbytes)}, at::TensorOptions().dtype(at::kByte));
}

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

void start_pinned_pool() { pinned_pool = new SlotPool(std::make_unique<PinnedAllocator>(), kMaxIdlePinnedSlots); }

}  // namespace

TorchDeviceSource::TorchDeviceSource(std::vector<c10::Storage> storages) : storages_(std::move(storages)) {
  for (const c10::Storage& storage : storages_) {
    if (!storage || side_streams_.count(storage.device()) != 0) continue;
    const c10::Device device = storage.device();
    const c10::impl::VirtualGuardImpl backend(device.type());
    const c10::Stream side = backend.getStreamFromGlobalPool(device);
    c10::Event queued_work(device.type());
    queued_work.record(backend.getStream(device));
    queued_work.block(side);
    side_streams_.emplace(device, side);
  }
}

SlotPool& TorchDeviceSource::slots() { return pinned_slots(); }

void TorchDeviceSource::copy(const std::vector<DevicePiece>& pieces) {
  const PlainDispatch plain;
  if (side_streams_.size() == 1) return copy_from_device(side_streams_.begin()->first, pieces);
  for (const auto& device_and_stream : side_streams_) {
    std::vector<DevicePiece> of_device;
    for (const DevicePiece& piece : pieces) {
      if (storages_[piece.record].device() == device_and_stream.first) of_device.push_back(piece);
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
    const at::Tensor source = device_bytes(storages_[piece.record], piece.record_offset, piece.nbytes);
    if (belongs_to_batch(piece)) {
      small.push_back(source);
    } else {
      host_bytes(piece.destination, piece.nbytes).copy_(source, /*non_blocking=*/true);
    }
  }
  const bool batched = small.size() >= kBatchAtLeast;
  if (batched) {
    gathered = at::cat(small);
    bounce.emplace(slots().acquire());
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
  static const bool started = [] {
    start_pinned_pool();
    pthread_atfork(nullptr, nullptr, start_pinned_pool);  // as SlotPool::host(): a lock may be held at fork()
    return true;
  }();
  static_cast<void>(started);
  return *pinned_pool;
}

}  // namespace sdio
