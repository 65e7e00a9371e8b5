// statedict_io._native: conversion, the GIL and exceptions; nothing else. Types in statedict_io/_native.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Storage.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "archive/layout.h"
#include "checksum/crc32.h"
#include "file/system_error.h"
#include "pipeline/archive_writer.h"
#include "pipeline/slot_pool.h"
#include "staging/torch_device_source.h"

namespace py = pybind11;

namespace sdio {
namespace {

// A planned archive. Holds the storages and the literal records until it is destroyed.
class Archive {
 public:
  Archive(const std::string& archive_name, const py::list& records, uint64_t alignment, bool compute_crc32) {
    std::vector<RecordSpec> specs;
    std::vector<Payload> payloads;
    std::vector<c10::Storage> on_device;
    specs.reserve(records.size());
    payloads.reserve(records.size());
    bool any_on_device = false;
    for (const py::handle record : records) {
      const py::tuple pair = py::reinterpret_borrow<py::tuple>(record);
      RecordSpec spec{pair[0].cast<std::string>(), 0};
      const py::object value = pair[1];
      Payload payload;
      c10::Storage device_storage;
      if (PyBytes_Check(value.ptr())) {
        payload.data = PyBytes_AS_STRING(value.ptr());
        spec.nbytes = static_cast<uint64_t>(PyBytes_GET_SIZE(value.ptr()));
      } else if (PyLong_Check(value.ptr())) {
        payload.kind = Payload::Kind::kHole;
        spec.nbytes = value.cast<uint64_t>();
      } else if (THPStorage_Check(value.ptr())) {
        const c10::Storage& storage = THPStorage_Unpack(value.ptr());
        spec.nbytes = storage.nbytes();
        if (storage.device_type() == c10::DeviceType::CPU) {
          payload.data = static_cast<const char*>(storage.data());
        } else {
          payload.kind = Payload::Kind::kDevice;
          device_storage = storage;
          any_on_device = true;
        }
      } else {
        throw py::type_error("record " + spec.name + ": expected bytes, int or torch.UntypedStorage");
      }
      specs.push_back(std::move(spec));
      payloads.push_back(payload);
      on_device.push_back(std::move(device_storage));
    }
    held_ = py::list(records);
    if (any_on_device) devices_ = std::make_unique<TorchDeviceSource>(std::move(on_device));
    content_ = std::make_unique<ArchiveContent>(ArchiveContent{
        ArchiveLayout(archive_name, std::move(specs), alignment), std::move(payloads), compute_crc32, devices_.get()});
  }

  uint64_t nbytes() const { return content_->layout.file_nbytes(); }

  // Returns whether the file took direct I/O.
  bool write_fd(int fd, DirectIo direct_io, const py::object& progress, size_t num_threads, size_t region_nbytes) const {
    const py::gil_scoped_release no_gil;
    PositionalSink sink(fd, direct_io);
    WriteOptions options;
    options.num_threads = num_threads;
    options.region_nbytes = region_nbytes;
    write_archive(*content_, sink, options, [&](uint64_t bytes_done) { watch(progress, bytes_done); });
    return sink.direct();
  }

  void write_stream(const py::object& write, const py::object& progress) const {
    const py::gil_scoped_release no_gil;
    stream_archive(
        *content_,
        [&](const char* bytes, size_t size) {
          const py::gil_scoped_acquire gil;
          write(py::memoryview::from_memory(bytes, static_cast<py::ssize_t>(size)));
        },
        [&](uint64_t bytes_done) { watch(progress, bytes_done); });
  }

 private:
  void watch(const py::object& progress, uint64_t bytes_done) const {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(bytes_done, nbytes());
  }

  py::list held_;
  std::unique_ptr<TorchDeviceSource> devices_;
  std::unique_ptr<ArchiveContent> content_;
};

DirectIo direct_io_from(const std::string& wish) {
  if (wish == "auto") return DirectIo::kAuto;
  if (wish == "on") return DirectIo::kOn;
  if (wish == "off") return DirectIo::kOff;
  throw py::value_error("direct must be 'auto', 'on' or 'off', got '" + wish + "'");
}

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

  py::class_<Archive>(module, "Archive")
      .def(py::init<const std::string&, const py::list&, uint64_t, bool>(), py::arg("archive_name"), py::arg("records"),
           py::kw_only(), py::arg("alignment"), py::arg("compute_crc32"))
      .def_property_readonly("nbytes", &Archive::nbytes)
      .def(
          "write_fd",
          [](const Archive& archive, int fd, const std::string& direct, const py::object& progress, size_t num_threads,
             size_t region_nbytes) { return archive.write_fd(fd, direct_io_from(direct), progress, num_threads, region_nbytes); },
          py::arg("fd"), py::kw_only(), py::arg("direct") = "auto", py::arg("progress") = py::none(),
          py::arg("num_threads") = 0, py::arg("region_nbytes") = 0)
      .def("write_stream", &Archive::write_stream, py::arg("write"), py::kw_only(), py::arg("progress") = py::none());

  module.def("crc32", &crc32_of_buffer, py::arg("data"), py::arg("crc") = 0);
  module.def("simd", &crc32_active_name);
  module.def("num_slots_allocated",
             [] { return SlotPool::host().num_allocated() + pinned_slots().num_allocated(); });
  module.def("release_buffers", [] {
    SlotPool::host().release_idle();
    pinned_slots().release_idle();
  });
}

}  // namespace sdio
