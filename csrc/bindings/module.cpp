// statedict_io._native: conversion, the GIL and exceptions; nothing else. Types in statedict_io/_native.pyi.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/archive.h"
#include "bindings/archive_reader.h"
#include "bindings/storage_table.h"
#include "bindings/strips.h"
#include "checksum/crc32.h"
#include "file/system_error.h"
#include "pickle/memo.h"
#include "pipeline/slot_pool.h"
#include "staging/torch_device_source.h"

namespace py = pybind11;

namespace sdio {
namespace {

uint32_t crc32_of_buffer(const py::buffer& buffer, uint32_t crc) {
  const py::buffer_info info = buffer.request();
  const py::gil_scoped_release no_gil;
  return crc32(crc, info.ptr, static_cast<size_t>(info.size * info.itemsize));
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native half of statedict_io; use statedict_io, not this.";

  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const SystemError& e) {
      // The caller knows the path and adds it.
      const py::object os_error = py::reinterpret_borrow<py::object>(PyExc_OSError)(e.error_number(), e.what());
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(os_error.ptr())), os_error.ptr());
    }
  });

  bind_archive(module);
  bind_storage_table(module);
  bind_strips(module);
  bind_archive_reader(module);

  module.def("crc32", &crc32_of_buffer, py::arg("data"), py::arg("crc") = 0);
  module.def(
      "without_unused_puts",
      [](const py::bytes& data_pkl) {
        const std::string lean = without_unused_puts(PyBytes_AS_STRING(data_pkl.ptr()),
                                                     static_cast<size_t>(PyBytes_GET_SIZE(data_pkl.ptr())));
        return py::bytes(lean);
      },
      py::arg("data_pkl"));
  module.def("simd", &crc32_active_name);
  module.def("num_slots_allocated", [] { return SlotPool::host().num_allocated() + pinned_slots().num_allocated(); });
  module.def("release_buffers", [] {
    for (SlotPool* pool : {&SlotPool::host(), &SlotPool::snapshots(), &pinned_slots(), &pinned_snapshot_slots()}) {
      pool->release_idle();
    }
  });
}

}  // namespace sdio
