// statedict_io._core.ArchiveReader and the exception for archives that are not sound.
#pragma once

#include <pybind11/pybind11.h>

namespace sdio {

void bind_archive_reader(pybind11::module_& module, pybind11::module_& testing);

}  // namespace sdio
