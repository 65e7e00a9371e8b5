#include "core/strips.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "core/device_without_streams.h"
#include "core/direct_io_wish.h"
#include "core/kept_storages.h"
#include "core/owned.h"
#include "core/storage_table.h"
#include "core/torch.h"
#include "core/watching.h"
#include "file/positional_sink.h"
#include "file/system_error.h"
#include "pipeline/write/strip_writer.h"

namespace py = pybind11;

namespace sdio {
namespace {

std::vector<Strip> strips_from(const py::sequence& list, const std::vector<Storage>& storages,
                               const std::vector<StorageBytes>& planned) {
  std::vector<Strip> strips;
  strips.reserve(list.size());
  for (const py::handle item : list) {
    const auto fields = item.cast<py::tuple>();
    if (fields.size() != 7) throw py::value_error("a strip has seven fields");
    Strip strip;
    strip.source = fields[0].cast<size_t>();
    strip.source_offset = fields[1].cast<uint64_t>();
    strip.file_offset = fields[2].cast<uint64_t>();
    strip.row_nbytes = fields[3].cast<uint64_t>();
    strip.num_rows = fields[4].cast<uint64_t>();
    strip.file_pitch = fields[5].cast<uint64_t>();
    strip.nbytes_after = fields[6].cast<uint64_t>();
    const StorageBytes& bytes = planned.at(strip.source);
    if (strip.source_offset > bytes.nbytes || strip.nbytes() > bytes.nbytes - strip.source_offset) {
      throw py::value_error("a strip is longer than its storage");
    }
    if (storages[strip.source].on_host()) strip.data = bytes.data + strip.source_offset;
    strips.push_back(strip);
  }
  return strips;
}

void check_all_unmoved(const std::vector<Storage>& storages, const std::vector<StorageBytes>& planned) {
  for (size_t i = 0; i < storages.size(); ++i) {
    check_unmoved(storages[i], storages[i].on_host() ? planned[i].data : nullptr, planned[i].nbytes,
                  [i] { return "storage " + std::to_string(i); });
  }
}

py::list write(const py::list& storage_list, const py::sequence& strip_list, int direct_fd, int fd,
               const std::string& direct, bool compute_crc32, const py::object& progress) {
  const std::vector<Storage> storages = storages_of(storage_list);
  std::vector<StorageBytes> planned;
  for (const Storage& storage : storages) planned.push_back(storage.bytes());
  const std::vector<Strip> strips = strips_from(strip_list, storages, planned);
  uint64_t nbytes = 0;
  for (const Strip& strip : strips) nbytes += strip.nbytes();
  std::unique_ptr<DeviceSource> devices;
  const auto on_device = [](const Storage& storage) { return !storage.on_host(); };
  if (std::any_of(storages.begin(), storages.end(), on_device)) {
    std::vector<DeviceBytes> sources(storages.size());
    for (size_t i = 0; i < storages.size(); ++i) {
      if (on_device(storages[i])) sources[i] = {storages[i], 0, planned[i].nbytes};
    }
    devices = device_source(storages.front().torch(), sources);
  }
  StripOptions options;
  options.compute_crc32 = compute_crc32;
  std::vector<StripResult> results;
  {
    const DirectIo wish = direct_io_from(direct);
    KeptStorages kept(storages, [&] { check_all_unmoved(storages, planned); });
    options.gate = kept.gate();
    try {
      ReleasedGil gil;
      PositionalSink direct_sink(direct_fd, wish);
      PositionalSink buffered_sink(fd, DirectIo::kOff);
      results = write_strips(strips, direct_sink, buffered_sink, devices.get(), options,
                             [&](uint64_t bytes_done) { watch(gil, progress, bytes_done, nbytes, kept); });
    } catch (const SystemError&) {
      kept.check();  // the kernel may have found memory gone that was a storage's
      throw;
    }
    kept.check();
  }
  return list_of(results.size(), [&](size_t i) {
    const uint64_t known = std::min<uint64_t>(strips[i].nbytes(), sizeof(StripResult::first_bytes));
    const char* const first_bytes = reinterpret_cast<char*>(results[i].first_bytes);
    return Py_BuildValue("(IN)", results[i].crc,
                         PyBytes_FromStringAndSize(first_bytes, static_cast<Py_ssize_t>(known)));
  });
}

}  // namespace

void bind_strips(py::module_& module) {
  module.def("write_strips", &write, py::arg("storages"), py::arg("strips"), py::kw_only(), py::arg("direct_fd"),
             py::arg("fd"), py::arg("direct") = "auto", py::arg("compute_crc32") = true,
             py::arg("progress") = py::none());
}

}  // namespace sdio
