// The GIL, released by a thread that had it, or taken by one that had not.
#pragma once

#include <Python.h>
#include <unistd.h>

#include "boundary/interpreter_exit.h"

namespace sdio {

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
    or_wait_for_exit([this] { PyEval_RestoreThread(state_); });
  }

  PyThreadState* state_;
};

// With the GIL for the lifetime of an object, in any thread, whether it has it or Python knows the thread or not.
class HeldGil {
 public:
  HeldGil()
      : state_(or_wait_for_exit([] {
          // From the beginning of its end on, only the thread that ends the interpreter has the GIL, and destroys what
          // modules hold.
          while (Py_IsInitialized() == 0 && !is_held()) pause();
          return PyGILState_Ensure();
        })) {}
  ~HeldGil() {
    or_wait_for_exit([this] { PyGILState_Release(state_); });  // which may let go of what belongs to the thread
  }
  HeldGil(const HeldGil&) = delete;
  HeldGil& operator=(const HeldGil&) = delete;

 private:
  static bool is_held() {
#if PY_VERSION_HEX >= 0x030d0000
    PyThreadState* const holder = PyThreadState_GetUnchecked();
#else
    PyThreadState* const holder = _PyThreadState_UncheckedGet();
#endif
    return holder != nullptr && holder == PyGILState_GetThisThreadState();
  }

  const PyGILState_STATE state_;
};

}  // namespace sdio
