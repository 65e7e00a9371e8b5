// The GIL, released by a thread that had it, or taken by one that had not.
//
// When the interpreter exits, CPython before 3.14 ends a thread that asks for the GIL with pthread_exit, also one that
// asks for it anew amid Python code. That unwinds its stack, through destructors that let nothing pass, or that need
// the GIL: the process would abort. Such a thread waits here for the process to end instead.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace sdio {

// Calls `function`, which asks for the GIL or runs Python code. It must call C functions only: C++ objects in it would
// be destroyed without the GIL.
template <typename Function>
auto or_wait_for_exit(const Function& function) {
  try {
    return function();
  } catch (...) {
    // This is what pthread_exit throws. It cannot be caught by its name, abi::__forced_unwind&, which would be a
    // reference to null; letting it pass would end the process.
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
  ~HeldGil() { PyGILState_Release(state_); }
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
