// Memory of ours as a Python object with a buffer, for torch.frombuffer.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "core/torch.h"

namespace sdio {

// A writable buffer of [data, data + nbytes), which lives as long as the object or a buffer of it.
pybind11::object memory_object(char* data, uint64_t nbytes, std::unique_ptr<ReadMemory> memory);

}  // namespace sdio
