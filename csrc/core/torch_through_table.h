// torch as a module _torch_<release> shows it: csrc/boundary/torch_functions.h.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "core/torch.h"

namespace sdio {

// `capsule` holds an sdio_torch_functions, whose module is never unloaded. Steps of the pipeline are recorded through
// it from now on. Throws std::invalid_argument where it is of another version.
std::unique_ptr<const Torch> torch_through_table(const pybind11::object& capsule);

}  // namespace sdio
