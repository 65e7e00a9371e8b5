// statedict_io._core: conversion, the GIL and exceptions; nothing else. Types in statedict_io/_core.pyi.
#include <pybind11/pybind11.h>

#include <string>

#include "checksum/crc32.h"
#include "core/device_without_streams.h"
#include "core/memory_object.h"
#include "core/open_archive.h"
#include "core/pinned_slots.h"
#include "core/planned_files.h"
#include "core/python_error.h"
#include "core/released_gil.h"
#include "core/snapshot.h"
#include "core/storage_table.h"
#include "core/strips.h"
#include "core/torch.h"
#include "core/torch_through_python.h"
#include "core/torch_through_table.h"
#include "file/system_error.h"
#include "pickle/memo.h"
#include "pickle/tensor_calls.h"
#include "pipeline/memory/slot_pool.h"

namespace py = pybind11;

namespace sdio {
namespace {

uint32_t crc32_of_buffer(const py::buffer& buffer, uint32_t crc) {
  const py::buffer_info info = buffer.request();
  const ReleasedGil gil;
  return crc32(crc, info.ptr, static_cast<size_t>(info.size * info.itemsize));
}

std::string lean(const py::bytes& data_pkl) {
  return without_unused_puts(PyBytes_AS_STRING(data_pkl.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(data_pkl.ptr())));
}

py::bytes without_unused_puts_of(const py::bytes& data_pkl) { return py::bytes(lean(data_pkl)); }

py::tuple tuple_of(const std::vector<uint64_t>& values) {
  py::tuple tuple(values.size());
  for (size_t i = 0; i < values.size(); ++i) tuple[i] = values[i];
  return tuple;
}

// As the unpickler decodes a string.
py::object text_of(const std::string& text) {
  PyObject* const decoded = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogatepass");
  if (decoded == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(decoded);
}

py::tuple abridged_pickle_of(const py::bytes& data_pkl) {
  const AbridgedPickle abridged = without_tensor_calls(lean(data_pkl));
  py::list calls(abridged.calls.size());
  for (size_t i = 0; i < abridged.calls.size(); ++i) {
    const TensorCall& call = abridged.calls[i];
    calls[i] = py::make_tuple(text_of(call.storage_type), text_of(call.key), text_of(call.location), call.numel,
                              call.offset, tuple_of(call.size), tuple_of(call.stride), call.requires_grad);
  }
  return py::make_tuple(py::bytes(abridged.stream), calls);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Native half of statedict_io; use statedict_io, not this.";

  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const SystemError& e) {
      // The caller knows the path and adds it.
      const py::object os_error = py::reinterpret_borrow<py::object>(PyExc_OSError)(e.error_number(), e.what());
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(os_error.ptr())), os_error.ptr());
    } catch (const PythonError& e) {
      e.restore();
    }
  });

  py::register_local_exception<DeviceWithoutStreams>(module, "DeviceWithoutStreams", PyExc_RuntimeError);

  module.def(
      "use_torch_access", [](py::object access) { use(torch_through_python(std::move(access))); }, py::arg("access"));
  module.def(
      "use_torch_functions", [](const py::object& capsule) { use(torch_through_table(capsule)); }, py::arg("capsule"));

  py::module_ testing = module.def_submodule("testing", "What only the tests of statedict_io call.");

  make_memory_type();
  bind_snapshot(module);
  bind_planned_files(module);
  bind_storage_table(module);
  bind_strips(module);
  bind_open_archive(module, testing);

  module.def("crc32", &crc32_of_buffer, py::arg("data"), py::arg("crc") = 0);
  module.def("abridged_pickle", &abridged_pickle_of, py::arg("data_pkl"));
  module.def("simd", &crc32_active_name);
  module.def("forget_fixed_storages", [] { torch().forget_fixed(); });
  module.def("release_buffers", [] {
    for (SlotPool* pool : {&SlotPool::host(), &SlotPool::snapshots(), &pinned_slots(), &pinned_snapshot_slots()}) {
      pool->release_idle();
    }
  });

  testing.def("num_slots_allocated", [] { return SlotPool::host().num_allocated() + pinned_slots().num_allocated(); });
  testing.def("without_unused_puts", &without_unused_puts_of, py::arg("data_pkl"));
}

}  // namespace sdio
