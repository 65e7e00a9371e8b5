// Storages on devices, copied by statedict_io.backends.device_copies, in Python. It is called from the same worker
// threads and copies into the same slots as LibTorch does where there is a _torch module.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/torch.h"

namespace sdio {

// `copies` is that module.
std::unique_ptr<SlotMemory> pin_through_python(const pybind11::object& copies);
std::unique_ptr<DeviceSource> source_through_python(const pybind11::object& copies,
                                                    const std::vector<DeviceBytes>& records);
std::unique_ptr<StorageDestination> destination_through_python(const pybind11::object& copies,
                                                               const std::string& device,
                                                               const std::vector<uint64_t>& sizes);
std::unique_ptr<DeviceClones> clones_through_python(const pybind11::object& copies, const Torch& torch,
                                                    const std::vector<DeviceBytes>& originals);

}  // namespace sdio
