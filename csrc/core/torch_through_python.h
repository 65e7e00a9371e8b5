// torch as its Python API shows it, for every release.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "core/torch.h"

namespace sdio {

// `access` is the module statedict_io.backends.torch_access.
std::unique_ptr<const Torch> torch_through_python(pybind11::object access);

}  // namespace sdio
