// Python code that is called in the pipeline's worker threads, and what it raises.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <memory>
#include <string>

#include "core/released_gil.h"

namespace sdio {

// A Python exception on its way from one thread to another. Unlike pybind11's, it may be dropped by any thread at any
// time, the exit of the interpreter included.
class PythonError final : public std::exception {
 public:
  explicit PythonError(const pybind11::error_already_set& error)  // with the GIL
      : value_(error.value().inc_ref().ptr(), &let_go), what_(error.what()) {}

  const char* what() const noexcept override { return what_.c_str(); }

  void restore() const {  // with the GIL
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value_.get())), value_.get());
  }

 private:
  static void let_go(PyObject* value) {
    const HeldGil gil;
    Py_DECREF(value);
  }

  std::shared_ptr<PyObject> value_;
  std::string what_;
};

// Calls `function` with the GIL, in any thread. Throws PythonError where Python raises. What it returns is of C++.
template <typename Function>
auto in_python(const Function& function) {
  const HeldGil gil;
  try {
    return function();
  } catch (const pybind11::error_already_set& error) {
    throw PythonError(error);
  }
}

// A reference that any thread may let go of.
class SharedObject {
 public:
  explicit SharedObject(pybind11::object object) : object_(std::move(object)) {}
  SharedObject(const SharedObject&) = delete;
  SharedObject& operator=(const SharedObject&) = delete;
  ~SharedObject() {
    const HeldGil gil;
    object_ = pybind11::object();
  }

  const pybind11::object& get() const { return object_; }  // with the GIL

 private:
  pybind11::object object_;
};

}  // namespace sdio
