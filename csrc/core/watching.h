// What the thread that called the pipeline does in Python meanwhile: it looks for signals, reports progress, and hands
// bytes to a callback.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>

#include "core/kept_storages.h"
#include "core/owned.h"
#include "core/python_error.h"
#include "core/released_gil.h"

namespace sdio {

// Throws what the handler of a signal raises. With the GIL.
inline void check_signals() {
  if (or_wait_for_exit([] { return PyErr_CheckSignals(); }) != 0) throw pybind11::error_already_set();
}

// The same without the GIL.
inline void watch(ReleasedGil& gil) {
  gil.with_gil([] { check_signals(); });
}

// The same, and calls `progress`, which is None or takes (bytes_done, bytes_total). Throws what it raises.
inline void watch(ReleasedGil& gil, const pybind11::object& progress, uint64_t bytes_done, uint64_t bytes_total) {
  gil.with_gil([&] {
    check_signals();
    if (!progress.is_none()) drop(call_python(progress, bytes_done, bytes_total));
  });
}

// The same while `storages` are read. Throws where `progress` has resized one of them, before anybody reads on.
inline void watch(ReleasedGil& gil, const pybind11::object& progress, uint64_t bytes_done, uint64_t bytes_total,
                  KeptStorages& storages) {
  if (progress.is_none()) return watch(gil, progress, bytes_done, bytes_total);
  ReadGate::closed(storages.gate(), [&] {
    watch(gil, progress, bytes_done, bytes_total);
    gil.with_gil([&] { storages.check(); });
  });
}

// Calls `write` with a view of bytes that is valid during the call.
inline void call_with_view(ReleasedGil& gil, const pybind11::object& write, const char* bytes, size_t nbytes) {
  gil.with_gil([&] {
    pybind11::object view = owned(
        [&] { return PyMemoryView_FromMemory(const_cast<char*>(bytes), static_cast<Py_ssize_t>(nbytes), PyBUF_READ); });
    drop(call_python(write, view));
  });
}

}  // namespace sdio
