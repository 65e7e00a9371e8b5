// direct="auto" | "on" | "off"
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "file/direct_io.h"

namespace sdio {

inline DirectIo direct_io_from(const std::string& wish) {
  if (wish == "auto") return DirectIo::kAuto;
  if (wish == "on") return DirectIo::kOn;
  if (wish == "off") return DirectIo::kOff;
  throw pybind11::value_error("direct must be 'auto', 'on' or 'off', got '" + wish + "'");
}

}  // namespace sdio
