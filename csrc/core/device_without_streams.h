// Where the pipeline gets the bytes of storages on devices, and what says that it cannot.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <vector>

#include "core/torch.h"

namespace sdio {

// A device whose storages have to be brought to the host by other means: it has no streams or no events.
class DeviceWithoutStreams : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws DeviceWithoutStreams, or what a signal raises. At least one of `records` is on a device.
inline std::unique_ptr<DeviceSource> device_source(const Torch& torch, const std::vector<DeviceBytes>& records) {
  try {
    return torch.source(records);
  } catch (const pybind11::error_already_set& error) {
    if (!error.matches(PyExc_RuntimeError)) throw;
    throw DeviceWithoutStreams(error.what());
  } catch (const std::runtime_error& error) {
    throw DeviceWithoutStreams(error.what());
  }
}

}  // namespace sdio
