// statedict_io._core.OpenArchive and the exception for archives that are not sound.
#pragma once

#include <pybind11/pybind11.h>

namespace sdio {

void bind_open_archive(pybind11::module_& module, pybind11::module_& testing);

}  // namespace sdio
