// Planned archives as a Python class. Types in statedict_io/_core.pyi.
#pragma once

#include <pybind11/pybind11.h>

namespace sdio {

void bind_planned_archive(pybind11::module_& module);

}  // namespace sdio
