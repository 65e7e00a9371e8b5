// The GIL, released by a thread that had it, or taken by one that had not.
//
// When the interpreter exits, CPython before 3.14 ends a thread that asks for the GIL with pthread_exit. That unwinds
// its stack, and neither a destructor nor pybind11's dispatcher lets it through: the process would abort. Such a thread
// waits here for the process to end instead.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace sdio {

// Calls `take`, which asks for the GIL.
template <typename Take>
auto take_gil(const Take& take) {
  try {
    return take();
  } catch (...) {
    // pthread_exit's; named, abi::__forced_unwind&, it would be a reference to null. Leaving would end the process.
    for (;;) pause();
  }
}

// Without the GIL for the lifetime of an object. The thread may be a daemon.
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() { take(); }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

  // Calls `function` with the GIL, in the thread that released it.
  template <typename Function>
  void with_gil(const Function& function) {
    take();
    const ReleaseAgain again{*this};
    function();
  }

 private:
  struct ReleaseAgain {
    ReleasedGil& gil;
    ~ReleaseAgain() { gil.state_ = PyEval_SaveThread(); }
  };

  void take() {
    take_gil([this] { PyEval_RestoreThread(state_); });
  }

  PyThreadState* state_;
};

// With the GIL for the lifetime of an object, in any thread, whether it has it or Python knows the thread or not.
class HeldGil {
 public:
  HeldGil()
      : state_(take_gil([] {
          while (Py_IsInitialized() == 0) pause();  // after the interpreter's end there is nothing to ask
          return PyGILState_Ensure();
        })) {}
  ~HeldGil() { PyGILState_Release(state_); }
  HeldGil(const HeldGil&) = delete;
  HeldGil& operator=(const HeldGil&) = delete;

 private:
  const PyGILState_STATE state_;
};

}  // namespace sdio
