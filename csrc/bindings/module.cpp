// statedict_io._native: conversion, the GIL and exceptions; nothing else. Types in statedict_io/_native.pyi.
#include <c10/core/DeviceType.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Storage.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "archive/layout.h"
#include "bindings/archive_reader.h"
#include "bindings/direct_io_wish.h"
#include "bindings/released_gil.h"
#include "bindings/storage_table.h"
#include "bindings/strips.h"
#include "checksum/crc32.h"
#include "file/system_error.h"
#include "pickle/memo.h"
#include "pipeline/archive_writer.h"
#include "pipeline/slot_pool.h"
#include "staging/torch_device_source.h"

namespace py = pybind11;

namespace sdio {
namespace {

// A planned archive. Holds the storages and the literal records until it is destroyed.
class Archive {
 public:
  Archive(const std::string& archive_name, const py::list& head, const py::object& storages, const py::list& tail,
          uint64_t alignment, bool compute_crc32, bool skip_data, const std::vector<std::string>& device_types)
      : literals_(py::make_tuple(py::tuple(head), py::tuple(tail))), storages_(storages_of(storages)) {
    const size_t num_records = head.size() + storages_.size() + tail.size();
    specs_.reserve(num_records);
    payloads_.reserve(num_records);
    add_literals(head);
    add_storages(skip_data, device_types);
    add_literals(tail);
    content_ =
        std::make_unique<ArchiveContent>(ArchiveContent{ArchiveLayout(archive_name, std::move(specs_), alignment),
                                                        std::move(payloads_), compute_crc32, devices_.get()});
  }

  uint64_t nbytes() const { return content_->layout.file_nbytes(); }

  // Returns whether the file took direct I/O.
  bool write_fd(int fd, DirectIo direct_io, const py::object& progress, size_t num_threads,
                size_t region_nbytes) const {
    ReleasedGil gil;
    PositionalSink sink(fd, direct_io);
    WriteOptions options;
    options.num_threads = num_threads;
    options.region_nbytes = region_nbytes;
    write_archive(*content_, sink, options, [&](uint64_t bytes_done) { watch(gil, progress, bytes_done); });
    return sink.direct();
  }

  void write_stream(const py::object& write, const py::object& progress) const {
    ReleasedGil gil;
    const auto write_view = [&](const char* bytes, size_t size) {
      gil.with_gil([&] { write(py::memoryview::from_memory(bytes, static_cast<py::ssize_t>(size))); });
    };
    stream_archive(*content_, write_view, [&](uint64_t bytes_done) { watch(gil, progress, bytes_done); });
  }

 private:
  void watch(ReleasedGil& gil, const py::object& progress, uint64_t bytes_done) const {
    gil.with_gil([&] {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!progress.is_none()) progress(bytes_done, nbytes());
    });
  }

  void add_literals(const py::list& records) {
    for (const py::handle record : records) {
      const auto [name, bytes] = record.cast<std::pair<std::string, py::bytes>>();
      Payload payload;
      payload.data = PyBytes_AS_STRING(bytes.ptr());  // of the object in literals_
      specs_.push_back({name, static_cast<uint64_t>(PyBytes_GET_SIZE(bytes.ptr()))});
      payloads_.push_back(payload);
    }
  }

  void add_storages(bool skip_data, const std::vector<std::string>& device_types) {
    std::vector<c10::Storage> on_device;
    for (size_t key = 0; key < storages_.size(); ++key) {
      c10::Storage& storage = storages_[key];
      Payload payload;
      if (skip_data) {
        payload.kind = Payload::Kind::kHole;
      } else if (storage.device_type() != c10::DeviceType::CPU) {
        const std::string type = c10::DeviceTypeName(storage.device_type(), /*lower_case=*/true);
        if (std::find(device_types.begin(), device_types.end(), type) != device_types.end()) {
          payload.kind = Payload::Kind::kDevice;
          on_device.resize(specs_.size());
          on_device.push_back(storage);
        } else {
          const py::object wrapped = py::reinterpret_steal<py::object>(THPStorage_Wrap(storage));
          const py::object on_cpu = wrapped.attr("cpu")();
          storage = THPStorage_Unpack(on_cpu.ptr());
        }
      }
      if (payload.kind == Payload::Kind::kMemory) payload.data = static_cast<const char*>(storage.data());
      specs_.push_back({"data/" + std::to_string(key), storage.nbytes()});
      payloads_.push_back(payload);
    }
    if (!on_device.empty()) {
      on_device.resize(specs_.size());
      devices_ = std::make_unique<TorchDeviceSource>(std::move(on_device));
    }
  }

  py::object literals_;
  std::vector<c10::Storage> storages_;
  std::vector<RecordSpec> specs_;  // until the layout takes them
  std::vector<Payload> payloads_;  // until content_ takes them
  std::unique_ptr<TorchDeviceSource> devices_;
  std::unique_ptr<ArchiveContent> content_;
};

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
      .def(py::init<const std::string&, const py::list&, const py::object&, const py::list&, uint64_t, bool, bool,
                    const std::vector<std::string>&>(),
           py::arg("archive_name"), py::arg("head"), py::arg("storages"), py::arg("tail"), py::kw_only(),
           py::arg("alignment"), py::arg("compute_crc32"), py::arg("skip_data") = false,
           py::arg("device_types") = std::vector<std::string>())
      .def_property_readonly("nbytes", &Archive::nbytes)
      .def(
          "write_fd",
          [](const Archive& archive, int fd, const std::string& direct, const py::object& progress, size_t num_threads,
             size_t region_nbytes) {
            return archive.write_fd(fd, direct_io_from(direct), progress, num_threads, region_nbytes);
          },
          py::arg("fd"), py::kw_only(), py::arg("direct") = "auto", py::arg("progress") = py::none(),
          py::arg("num_threads") = 0, py::arg("region_nbytes") = 0)
      .def("write_stream", &Archive::write_stream, py::arg("write"), py::kw_only(), py::arg("progress") = py::none());

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
    SlotPool::host().release_idle();
    pinned_slots().release_idle();
  });
}

}  // namespace sdio
