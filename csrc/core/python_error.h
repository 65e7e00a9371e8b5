// Python code that is called amid C++ frames, also in the pipeline's worker threads, and what it raises.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <exception>
#include <memory>
#include <type_traits>
#include <utility>

#include "core/owned.h"
#include "core/released_gil.h"

namespace sdio {

template <typename Argument>
pybind11::object as_object(const Argument& argument) {
  if constexpr (std::is_base_of_v<pybind11::object, Argument>) {
    return argument;
  } else {
    return pybind11::cast(argument);
  }
}

// Calls a Python function, with the GIL, which that function may give up and take again.
template <typename... Arguments>
pybind11::object call_python(const pybind11::object& callable, const Arguments&... arguments) {
  constexpr size_t kCount = sizeof...(Arguments);
  const std::array<pybind11::object, kCount> held{as_object(arguments)...};
  std::array<PyObject*, 1 + kCount> passed{};  // the callee may use the first one
  for (size_t i = 0; i < kCount; ++i) passed[1 + i] = held[i].ptr();
  return owned([&] {
    return PyObject_Vectorcall(callable.ptr(), passed.data() + 1, kCount | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  });
}

// The same for a method of `object`, which is looked up there.
template <typename... Arguments>
pybind11::object call_method(const pybind11::object& object, const char* name, const Arguments&... arguments) {
  constexpr size_t kCount = sizeof...(Arguments);
  const pybind11::str method(name);
  const std::array<pybind11::object, kCount> held{as_object(arguments)...};
  std::array<PyObject*, 2 + kCount> passed{nullptr, object.ptr()};
  for (size_t i = 0; i < kCount; ++i) passed[2 + i] = held[i].ptr();
  return owned([&] {
    return PyObject_VectorcallMethod(method.ptr(), passed.data() + 1, (1 + kCount) | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                     nullptr);
  });
}

// Drops a reference in any thread.
inline void let_go(pybind11::object&& object) {
  const HeldGil gil;
  drop(std::move(object));
}

// A reference that any thread may let go of.
class SharedObject {
 public:
  explicit SharedObject(pybind11::object object) : object_(std::move(object)) {}
  SharedObject(const SharedObject&) = delete;
  SharedObject& operator=(const SharedObject&) = delete;
  ~SharedObject() { let_go(std::move(object_)); }

  const pybind11::object& get() const { return object_; }  // with the GIL

 private:
  pybind11::object object_;
};

// A Python exception on its way from one thread to another. Unlike pybind11's, it may be dropped by any thread at any
// time, the exit of the interpreter included.
class PythonError final : public std::exception {
 public:
  explicit PythonError(const pybind11::error_already_set& error)  // with the GIL
      : value_(std::make_shared<SharedObject>(error.value())), is_exception_(error.matches(PyExc_Exception)) {}

  const char* what() const noexcept override { return "Python code has raised"; }

  // False for what a signal raises to end the process or the call: KeyboardInterrupt, SystemExit.
  bool is_exception() const { return is_exception_; }

  void restore() const {  // with the GIL
    PyObject* const value = value_->get().ptr();
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value)), value);
  }

 private:
  std::shared_ptr<const SharedObject> value_;
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

}  // namespace sdio
