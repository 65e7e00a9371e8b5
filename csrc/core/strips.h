// write_strips for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace sdio {

void bind_strips(pybind11::module_& module);

}  // namespace sdio
