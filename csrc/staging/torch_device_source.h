// Storages on accelerators as a DeviceSource, through LibTorch's device-generic streams, events and copies: no CUDA
// header, no CUDA library.
//
// Construct it in the thread whose current streams the save is ordered after, holding whatever lock that thread holds;
// copy() is then called from the pipeline's workers. The storages are referenced until destruction.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Storage.h>
#include <c10/core/Stream.h>

#include <unordered_map>
#include <vector>

#include "pipeline/payload.h"

namespace sdio {

class TorchDeviceSource final : public DeviceSource {
 public:
  // `storages[record]` for every record on a device; others are empty.
  explicit TorchDeviceSource(std::vector<c10::Storage> storages);

  void copy(const std::vector<DevicePiece>& pieces) override;
  SlotPool& slots() override;

 private:
  void copy_from_device(c10::Device device, const std::vector<DevicePiece>& pieces);

  std::vector<c10::Storage> storages_;
  std::unordered_map<c10::Device, c10::Stream> side_streams_;
};

// The process's pool of slots in pinned memory; plain memory where the accelerator cannot pin.
SlotPool& pinned_slots();

}  // namespace sdio
