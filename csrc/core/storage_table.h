// The part of pickling that is done once per tensor, in C++: reducing plain tensors and naming their storages.
//
// Python's own C pickler still writes the stream, so every rule of its memo holds. Only its questions "how is this
// tensor reduced" and "is this a storage" are answered without running Python code, which takes most of the time where
// there are many tensors. All functions need the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "core/torch.h"

namespace sdio {

void bind_storage_table(pybind11::module_& module);

// The storages of a StorageTable or of a list of torch.UntypedStorage, in order. Raises TypeError for anything else,
// and what torch's data_ptr() raises where one has no memory.
std::vector<Storage> storages_of(const pybind11::object& table_or_list);

}  // namespace sdio
