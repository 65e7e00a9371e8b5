// What Python's C API returns, as pybind11 holds it.
#pragma once

#include <pybind11/pybind11.h>

namespace sdio {

// Takes over a new reference; null: throws the error that is set.
inline pybind11::object owned(PyObject* result) {
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

}  // namespace sdio
