// The GIL, released for the lifetime of an object, by a thread that may be a daemon.
//
// When the interpreter exits, CPython before 3.14 ends a daemon thread that asks for the GIL with pthread_exit. That
// unwinds its stack, and neither a destructor nor pybind11's dispatcher lets it through: the process would abort. Such
// a thread waits here for the process to end instead.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace sdio {

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
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      // pthread_exit's; named, abi::__forced_unwind&, it would be a reference to null. Leaving would end the process.
      for (;;) pause();
    }
  }

  PyThreadState* state_;
};

}  // namespace sdio
