// Planned files, of archives and of payloads alone, as Python classes. Types in statedict_io/_core.pyi.
#pragma once

#include <pybind11/pybind11.h>

namespace sdio {

void bind_planned_files(pybind11::module_& module);

}  // namespace sdio
