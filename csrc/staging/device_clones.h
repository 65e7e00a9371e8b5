// Copies of storages in the memory of the devices they are on: the snapshot of an asynchronous save that is over as
// soon as the device gets to it.
//
// The copies are queued on the calling thread's current streams, so what it queues there afterwards comes after them.
// done() and wait() may be called from any thread.
#pragma once

#include <c10/core/Event.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "staging/torch_device_source.h"

namespace sdio {

class DeviceClones {
 public:
  // None where a device has no memory for them. Entries without a storage have no clone. Throws what the device
  // reports.
  static std::optional<DeviceClones> queue(const std::vector<DeviceBytes>& originals);

  const std::vector<DeviceBytes>& clones() const { return clones_; }

  bool done() const;
  void wait() const;  // without the GIL: for as long as the device is busy with what was queued before

 private:
  explicit DeviceClones(const std::vector<DeviceBytes>& originals);

  std::vector<DeviceBytes> clones_;
  std::vector<c10::Event> copied_;  // one a device
};

}  // namespace sdio
