// Memory of ours as a Python object with a buffer, for torch.frombuffer.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "core/torch.h"

namespace sdio {

// Makes the type of these objects; when the module is made. Not when the first object is: making a type may run Python
// code and let another thread take the GIL, which would then wait for the type, and this one for the GIL.
void make_memory_type();

// A writable buffer of [data, data + nbytes), which lives as long as the object or a buffer of it.
pybind11::object memory_object(char* data, uint64_t nbytes, std::unique_ptr<ReadMemory> memory);

}  // namespace sdio
