// What Python's C API returns, as pybind11 holds it.
#pragma once

#include <pybind11/pybind11.h>

namespace sdio {

// Takes over a new reference; null: throws the error that is set.
inline pybind11::object owned(PyObject* result) {
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

// `tuple`, which cannot be part of a cycle: the cyclic collector need not look at it. Its passes over the objects of
// 100,000 tensors would take long.
inline pybind11::object untracked(pybind11::object tuple) {
  if (PyTuple_GET_SIZE(tuple.ptr()) != 0) PyObject_GC_UnTrack(tuple.ptr());  // () is everybody's
  return tuple;
}

}  // namespace sdio
