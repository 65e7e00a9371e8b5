#include "core/open_archive.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "archive/corrupt_archive.h"
#include "archive/directory.h"
#include "core/direct_io_wish.h"
#include "core/owned.h"
#include "core/read_storages.h"
#include "core/torch.h"
#include "core/watching.h"
#include "file/positional_source.h"
#include "pipeline/read/payload_reader.h"
#include "pipeline/read/single_reads.h"

namespace py = pybind11;

namespace sdio {
namespace {

py::handle corrupt_archive;  // the exception's type, made with the module

// Names are bytes of anybody's choice: what is not UTF-8 stays printable.
PyObject* new_text(std::string_view bytes) {
  return PyUnicode_DecodeUTF8(bytes.data(), static_cast<py::ssize_t>(bytes.size()), "backslashreplace");
}
py::object text(std::string_view bytes) { return owned(new_text(bytes)); }

// (offset, nbytes, alignment) of each.
using Payloads = std::vector<std::tuple<uint64_t, uint64_t, uint16_t>>;

class OpenArchive {
 public:
  OpenArchive(int fd, DirectIo direct_io) {
    const ReleasedGil gil;
    source_ = std::make_unique<PositionalSource>(fd, direct_io);
    directory_ = std::make_unique<Directory>(read_directory(*source_));
  }

  // Payloads at known places of a file in another format.
  OpenArchive(int fd, const Payloads& payloads, DirectIo direct_io) {
    std::vector<PayloadRange> ranges;
    ranges.reserve(payloads.size());
    for (const auto& [offset, nbytes, alignment] : payloads) ranges.push_back({offset, nbytes, alignment});
    const ReleasedGil gil;
    source_ = std::make_unique<PositionalSource>(fd, direct_io);
    directory_ = std::make_unique<Directory>(ranges, source_->nbytes());
  }

  py::object archive_name() const { return text(directory_->archive_name()); }

  py::list entries() const {
    const std::string folder = std::string(directory_->archive_name()) + "/";
    return list_of(directory_->num_records(), [&](size_t i) {
      const DirectoryRecord& record = (*directory_)[i];
      std::string_view name = directory_->name(i);
      if (folder.size() > 1 && name.size() > folder.size() && name.substr(0, folder.size()) == folder) {
        name.remove_prefix(folder.size());
      }
      return Py_BuildValue("(NKKKIO)", new_text(name), static_cast<unsigned long long>(record.header_offset),
                           static_cast<unsigned long long>(record.nbytes),
                           static_cast<unsigned long long>(record.stored_nbytes), record.crc32,
                           record.compressed ? Py_True : Py_False);
    });
  }

  uint64_t payload_offset(size_t record) const {
    check(record);
    const ReleasedGil gil;
    return read_payload_offset(*directory_, *source_, record);
  }

  py::object read_stored_bytes(size_t record, uint64_t offset, uint64_t nbytes) const {
    check(record);
    const uint64_t stored_nbytes = (*directory_)[record].stored_nbytes;
    // Before the allocation: it is no larger than the file.
    if (offset > stored_nbytes || nbytes > stored_nbytes - offset) throw py::index_error("beyond the record's end");
    const py::object bytes = owned(PyBytes_FromStringAndSize(nullptr, static_cast<py::ssize_t>(nbytes)));
    {
      char* const destination = PyBytes_AS_STRING(bytes.ptr());
      const ReleasedGil gil;
      read_stored(*directory_, *source_, record, offset, nbytes, destination);
    }
    return bytes;
  }

  void read_into(size_t record, uint64_t offset, const py::buffer& destination, uint64_t num_rows,
                 uint64_t pitch) const {
    check(record);
    const py::buffer_info info = destination.request(/*writable=*/true);
    if (PyBuffer_IsContiguous(info.view(), 'C') == 0) throw py::value_error("the destination must be contiguous");
    const auto nbytes = static_cast<uint64_t>(info.size * info.itemsize);
    if (num_rows == 0 || nbytes % num_rows != 0) throw py::value_error("the destination must hold whole rows");
    const ReleasedGil gil;
    read_stored_rows(*directory_, *source_, record, {offset, nbytes / num_rows, num_rows, pitch},
                     static_cast<char*>(info.ptr));
  }

  // (storages, records whose checksum is wrong): no storages if there are any.
  py::tuple load_storages(const std::vector<size_t>& records, bool verify, const py::object& progress) const {
    ReadStorages memory(records.size());
    std::vector<size_t> wrong;
    {
      ReleasedGil gil;
      wrong = load_payloads(*directory_, *source_, records, memory, verify, {},
                            [&](uint64_t done, uint64_t total) { watch(gil, progress, done, total); });
    }
    return loaded(memory, wrong);
  }

  // The same onto a device; None where that is for torch to do.
  std::optional<py::tuple> load_storages_onto(const std::string& device, const std::vector<size_t>& records,
                                              bool verify, const py::object& progress,
                                              const ReadOptions& options) const {
    std::vector<uint64_t> sizes;
    for (const size_t record : records) {
      check(record);
      sizes.push_back((*directory_)[record].nbytes);
    }
    const std::unique_ptr<StorageDestination> destination = torch().destination(device, sizes);
    if (destination == nullptr) return std::nullopt;
    std::vector<size_t> wrong;
    {
      ReleasedGil gil;
      wrong = load_payloads_onto(*directory_, *source_, records, *destination, verify, options,
                                 [&](uint64_t done, uint64_t total) { watch(gil, progress, done, total); });
    }
    return loaded(*destination, wrong);
  }

  std::vector<uint32_t> checksums(const std::vector<size_t>& records, const py::object& progress) const {
    ReleasedGil gil;
    return payload_checksums(*directory_, *source_, records, {},
                             [&](uint64_t done, uint64_t total) { watch(gil, progress, done, total); });
  }

  uint64_t direct_nbytes() const { return source_->direct_nbytes(); }

 private:
  template <typename Memory>
  static py::tuple loaded(Memory& memory, const std::vector<size_t>& wrong) {
    const py::list storages = wrong.empty() ? memory.storages() : py::list();
    const py::list records = list_of(wrong.size(), [&](size_t i) { return PyLong_FromSize_t(wrong[i]); });
    return owned([&] { return PyTuple_Pack(2, storages.ptr(), records.ptr()); });
  }

  void check(size_t record) const {
    if (record >= directory_->num_records()) throw py::index_error("no record " + std::to_string(record));
  }

  std::unique_ptr<PositionalSource> source_;
  std::unique_ptr<Directory> directory_;
};

}  // namespace

void bind_open_archive(py::module_& module, py::module_& testing) {
  corrupt_archive = py::exception<CorruptArchive>(module, "CorruptArchive", PyExc_ValueError).release();
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const CorruptArchive& e) {
      PyErr_SetObject(corrupt_archive.ptr(), text(e.what()).ptr());
    } catch (const UnexpectedEnd& e) {
      PyErr_SetObject(corrupt_archive.ptr(), text(e.what()).ptr());
    }
  });

  py::class_<OpenArchive>(module, "OpenArchive")
      .def(py::init([](int fd, const std::string& direct, const std::optional<Payloads>& payloads) {
             if (!payloads) return std::make_unique<OpenArchive>(fd, direct_io_from(direct));
             return std::make_unique<OpenArchive>(fd, *payloads, direct_io_from(direct));
           }),
           py::arg("fd"), py::kw_only(), py::arg("direct") = "auto", py::arg("payloads") = py::none())
      .def_property_readonly("archive_name", &OpenArchive::archive_name)
      .def("entries", &OpenArchive::entries)
      .def("payload_offset", &OpenArchive::payload_offset, py::arg("record"))
      .def("read_stored", &OpenArchive::read_stored_bytes, py::arg("record"), py::arg("offset"), py::arg("nbytes"))
      .def("read_into", &OpenArchive::read_into, py::arg("record"), py::arg("offset"), py::arg("destination"),
           py::arg("num_rows") = 1, py::arg("pitch") = 0)
      .def("load_storages", &OpenArchive::load_storages, py::arg("records"), py::kw_only(), py::arg("verify"),
           py::arg("progress") = py::none())
      .def(
          "load_storages_onto",
          [](const OpenArchive& reader, const std::string& device, const std::vector<size_t>& records, bool verify,
             const py::object& progress) { return reader.load_storages_onto(device, records, verify, progress, {}); },
          py::arg("device"), py::arg("records"), py::kw_only(), py::arg("verify"), py::arg("progress") = py::none())
      .def("checksums", &OpenArchive::checksums, py::arg("records"), py::kw_only(), py::arg("progress") = py::none())
      .def_property_readonly("direct_nbytes", &OpenArchive::direct_nbytes);

  testing.def(
      "load_storages_onto",
      [](const OpenArchive& reader, const std::string& device, const std::vector<size_t>& records, bool verify,
         size_t num_threads, uint64_t span_nbytes) {
        return reader.load_storages_onto(device, records, verify, py::none(), {num_threads, span_nbytes});
      },
      py::arg("reader"), py::arg("device"), py::arg("records"), py::kw_only(), py::arg("verify"),
      py::arg("num_threads"), py::arg("span_nbytes"));
}

}  // namespace sdio
