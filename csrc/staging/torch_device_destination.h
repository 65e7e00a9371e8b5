// Storages on an accelerator that the reader fills through pinned slots, with LibTorch's device-generic streams, events
// and copies: no CUDA header, no CUDA library.
//
// Make it in the thread whose current stream the copies are ordered after; copy() is then called from the pipeline's
// workers, the rest from the first thread, without need of the GIL. The storages are the caller's to use on any stream
// once every QueuedCopies has been waited for.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Storage.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "pipeline/device_destination.h"

namespace sdio {

class TorchDeviceDestination final : public DeviceDestination {
 public:
  // A storage of each size. Null where the device has no streams and events, or no room: torch's own way copes with the
  // one, and says the other in its words.
  static std::unique_ptr<TorchDeviceDestination> make(c10::Device device, const std::vector<uint64_t>& sizes);

  std::unique_ptr<QueuedCopies> copy(const std::vector<ArrivedPiece>& pieces) override;
  SlotPool& slots() override;

  // One a request; once.
  std::vector<c10::Storage> take_storages() { return std::move(storages_); }

 private:
  TorchDeviceDestination(c10::Device device, const std::vector<uint64_t>& sizes);

  std::vector<c10::Storage> storages_;
  c10::Stream side_stream_;
};

}  // namespace sdio
