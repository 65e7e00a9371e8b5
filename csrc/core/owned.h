// What Python's C API returns, as pybind11 holds it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>

#include "boundary/interpreter_exit.h"

namespace sdio {

// Takes over a new reference; null: throws the error that is set.
inline pybind11::object owned(PyObject* result) {
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

// What `function` returns, which may run Python code: see boundary/interpreter_exit.h.
template <typename Function>
auto owned(const Function& function) -> decltype(owned(function())) {
  return owned(or_wait_for_exit(function));
}

// A list of `size` objects. item(i) returns a new reference, or null with an error; it consists of C functions.
template <typename Item>
pybind11::list list_of(size_t size, const Item& item) {
  return owned([&]() -> PyObject* {
    PyObject* const list = PyList_New(static_cast<Py_ssize_t>(size));
    for (size_t i = 0; list != nullptr && i < size; ++i) {
      PyObject* const made = item(i);
      if (made == nullptr) {
        Py_DECREF(list);
        return nullptr;
      }
      PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), made);
    }
    return list;
  });
}

// Lets go of what may be the last reference to an object of any class; with the GIL.
inline void drop(pybind11::object object) {
  or_wait_for_exit([last = object.release().ptr()] { Py_XDECREF(last); });
}

// `tuple`, which cannot be part of a cycle: the cyclic collector need not look at it. Its passes over the objects of
// 100,000 tensors would take long.
inline pybind11::object untracked(pybind11::object tuple) {
  if (PyTuple_GET_SIZE(tuple.ptr()) != 0) PyObject_GC_UnTrack(tuple.ptr());  // () is everybody's
  return tuple;
}

}  // namespace sdio
