// Python code that is called amid C++ frames, also in the pipeline's worker threads, and what it raises.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <memory>
#include <string>
#include <utility>

#include "core/owned.h"
#include "core/released_gil.h"

namespace sdio {

// Calls a Python function, with the GIL, which that function may give up and take again.
template <typename... Arguments>
pybind11::object call_python(const pybind11::object& callable, Arguments&&... arguments) {
  const pybind11::tuple packed = pybind11::make_tuple(std::forward<Arguments>(arguments)...);
  return owned(or_wait_for_exit([&] { return PyObject_Call(callable.ptr(), packed.ptr(), nullptr); }));
}

// Drops a reference in any thread. An object that is destroyed by that may run Python code.
inline void let_go(PyObject* object) {
  const HeldGil gil;
  or_wait_for_exit([object] { Py_DECREF(object); });
}

// A Python exception on its way from one thread to another. Unlike pybind11's, it may be dropped by any thread at any
// time, the exit of the interpreter included.
class PythonError final : public std::exception {
 public:
  explicit PythonError(const pybind11::error_already_set& error)  // with the GIL
      : value_(error.value().inc_ref().ptr(), &let_go),
        what_(error.what()),
        is_exception_(error.matches(PyExc_Exception)) {}

  const char* what() const noexcept override { return what_.c_str(); }

  // False for what a signal raises to end the process or the call: KeyboardInterrupt, SystemExit.
  bool is_exception() const { return is_exception_; }

  void restore() const {  // with the GIL
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value_.get())), value_.get());
  }

 private:
  std::shared_ptr<PyObject> value_;
  std::string what_;
  bool is_exception_;
};

// Calls `function` with the GIL, in any thread. Throws PythonError where Python raises. It must not return a Python
// object.
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
  ~SharedObject() { let_go(object_.release().ptr()); }

  const pybind11::object& get() const { return object_; }  // with the GIL

 private:
  pybind11::object object_;
};

}  // namespace sdio
