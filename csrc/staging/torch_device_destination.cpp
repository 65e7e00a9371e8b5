#include "staging/torch_device_destination.h"

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/util/Exception.h>

#include "staging/raw_bytes.h"
#include "staging/side_stream.h"
#include "staging/torch_device_source.h"

namespace sdio {
namespace {

class CopiesOfOneSlot final : public QueuedCopies {
 public:
  explicit CopiesOfOneSlot(const c10::Stream& stream) : stream_(stream), landed_(stream.device_type()) {}
  CopiesOfOneSlot(const CopiesOfOneSlot&) = delete;
  CopiesOfOneSlot& operator=(const CopiesOfOneSlot&) = delete;

  ~CopiesOfOneSlot() override {
    if (waited_) return;
    try {
      stream_.synchronize();
    } catch (...) {  // a lost device copies nothing any more; the first error is the one to report
    }
  }

  void queued() { landed_.record(stream_); }

  void wait() override {
    landed_.synchronize();
    waited_ = true;
  }

 private:
  const c10::Stream stream_;
  c10::Event landed_;
  bool waited_ = false;
};

std::vector<c10::Storage> storages_on(c10::Device device, const std::vector<uint64_t>& sizes) {
  const PlainDispatch plain;
  std::vector<c10::Storage> storages;
  storages.reserve(sizes.size());
  const auto bytes = at::TensorOptions().dtype(at::kByte).device(device);
  for (const uint64_t nbytes : sizes) storages.push_back(at::empty({static_cast<int64_t>(nbytes)}, bytes).storage());
  return storages;
}

}  // namespace

std::unique_ptr<TorchDeviceDestination> TorchDeviceDestination::make(c10::Device device,
                                                                     const std::vector<uint64_t>& sizes) {
  try {
    return std::unique_ptr<TorchDeviceDestination>(new TorchDeviceDestination(device, sizes));
  } catch (const c10::Error&) {
    return nullptr;
  }
}

// The storages first: what the allocator queues for them comes before the copies too.
TorchDeviceDestination::TorchDeviceDestination(c10::Device device, const std::vector<uint64_t>& sizes)
    : storages_(storages_on(device, sizes)), side_stream_(side_stream_after_current(device)) {}

SlotPool& TorchDeviceDestination::slots() { return pinned_slots(); }

std::unique_ptr<QueuedCopies> TorchDeviceDestination::copy(const std::vector<ArrivedPiece>& pieces) {
  const PlainDispatch plain;
  const c10::StreamGuard on_side_stream(side_stream_);
  auto copies = std::make_unique<CopiesOfOneSlot>(side_stream_);
  for (const ArrivedPiece& piece : pieces) {
    const at::Tensor source = host_bytes(const_cast<char*>(piece.source), piece.nbytes);
    device_bytes(storages_[piece.request], piece.payload_offset, piece.nbytes).copy_(source, /*non_blocking=*/true);
  }
  copies->queued();
  return copies;
}

}  // namespace sdio
