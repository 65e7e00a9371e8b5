// Storages on accelerators as a DeviceSource, through LibTorch's device-generic streams, events and copies: no CUDA
// header, no CUDA library.
//
// Construct it in the thread whose current streams the save is ordered after, holding whatever lock that thread holds;
// copy() is then called from the pipeline's workers. The storages are referenced until destruction.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Storage.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "pipeline/payload.h"

namespace sdio {

struct DeviceBytes {
  c10::Storage storage;  // none: not on a device
  uint64_t offset = 0;   // of the first byte in it
  uint64_t nbytes = 0;
};

class TorchDeviceSource final : public DeviceSource {
 public:
  // `records[record]` for every record on a device; others have no storage.
  explicit TorchDeviceSource(std::vector<DeviceBytes> records);

  const std::vector<DeviceBytes>& records() const { return records_; }

  void copy(const std::vector<DevicePiece>& pieces) override;
  SlotPool& slots() override;

 private:
  void copy_from_device(c10::Device device, const std::vector<DevicePiece>& pieces);

  std::vector<DeviceBytes> records_;
  std::unordered_map<c10::Device, c10::Stream> side_streams_;
};

// The process's pools of slots in pinned memory, as SlotPool::host() and SlotPool::snapshots(); plain memory where the
// accelerator cannot pin.
SlotPool& pinned_slots();
SlotPool& pinned_snapshot_slots();

}  // namespace sdio
