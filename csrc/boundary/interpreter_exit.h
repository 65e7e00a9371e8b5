// Threads that are amid C++ code when the interpreter exits.
//
// CPython before 3.14 ends a thread that asks for the GIL from then on with pthread_exit, also one that gave the GIL up
// somewhere in Python code. On Linux that unwinds its stack, through destructors that let nothing pass, or that need
// the GIL, or while other threads use what they destroy: the process would abort. Such a thread waits for the process
// to end instead. No more is needed than that unwinding never begins: any function that runs Python code, or may, is
// called through or_wait_for_exit(). Besides calls, these are functions that
//
// - make an object known to the cyclic collector, such as a tuple, list, view or bound method: before 3.12 that may
//   collect, which runs finalizers; later PyErr_CheckSignals() does;
// - let go of what may be the last reference to an object of a class that is not our own.
#pragma once

#include <unistd.h>

namespace sdio {

[[noreturn]] inline void wait_for_exit() {
  for (;;) pause();
}

// Calls `function`. It must consist of C functions only: C++ objects in it would be destroyed without the GIL.
template <typename Function>
auto or_wait_for_exit(const Function& function) {
  try {
    return function();
  } catch (...) {
    // This is what pthread_exit throws. It cannot be caught by its name, abi::__forced_unwind&, which would be a
    // reference to null; letting it pass would end the process.
    wait_for_exit();
  }
}

}  // namespace sdio
