#include "bindings/strips.h"

#include <c10/core/DeviceType.h>
#include <c10/core/Storage.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "bindings/direct_io_wish.h"
#include "bindings/storage_table.h"
#include "bindings/watching.h"
#include "file/positional_sink.h"
#include "pipeline/strip_writer.h"
#include "staging/fixed_storages.h"
#include "staging/torch_device_source.h"

namespace py = pybind11;

namespace sdio {
namespace {

std::vector<Strip> strips_from(const py::sequence& list, const std::vector<c10::Storage>& storages) {
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
    const c10::Storage& storage = storages.at(strip.source);
    if (strip.source_offset > storage.nbytes() || strip.nbytes() > storage.nbytes() - strip.source_offset) {
      throw py::value_error("a strip is longer than its storage");
    }
    if (storage.device_type() == c10::DeviceType::CPU) {
      strip.data = static_cast<const char*>(storage.data()) + strip.source_offset;
    }
    strips.push_back(strip);
  }
  return strips;
}

py::list write(const py::list& storage_list, const py::sequence& strip_list, int direct_fd, int fd,
               const std::string& direct, bool compute_crc32, const py::object& progress, size_t num_writers,
               size_t region_nbytes) {
  std::vector<c10::Storage> storages = storages_of(storage_list);
  const std::vector<Strip> strips = strips_from(strip_list, storages);
  uint64_t nbytes = 0;
  for (const Strip& strip : strips) nbytes += strip.nbytes();
  std::unique_ptr<TorchDeviceSource> devices;
  const auto on_device = [](const c10::Storage& storage) { return storage.device_type() != c10::DeviceType::CPU; };
  if (std::any_of(storages.begin(), storages.end(), on_device)) {
    std::vector<DeviceBytes> sources(storages.size());
    for (size_t i = 0; i < storages.size(); ++i) {
      if (on_device(storages[i])) sources[i] = {storages[i], 0, storages[i].nbytes()};
    }
    devices = std::make_unique<TorchDeviceSource>(std::move(sources));
  }
  StripOptions options;
  options.compute_crc32 = compute_crc32;
  options.num_writers = num_writers;
  options.region_nbytes = region_nbytes;
  std::vector<StripResult> results;
  {
    const DirectIo wish = direct_io_from(direct);
    const FixedStorages fixed(storages);
    ReleasedGil gil;
    PositionalSink direct_sink(direct_fd, wish);
    PositionalSink buffered_sink(fd, DirectIo::kOff);
    results = write_strips(strips, direct_sink, buffered_sink, devices.get(), options,
                           [&](uint64_t bytes_done) { watch(gil, progress, bytes_done, nbytes); });
  }
  py::list told(results.size());
  for (size_t i = 0; i < results.size(); ++i) {
    const size_t known = std::min<uint64_t>(strips[i].nbytes(), sizeof(StripResult::first_bytes));
    told[i] = py::make_tuple(results[i].crc, py::bytes(reinterpret_cast<char*>(results[i].first_bytes), known));
  }
  return told;
}

}  // namespace

void bind_strips(py::module_& module) {
  module.def("write_strips", &write, py::arg("storages"), py::arg("strips"), py::kw_only(), py::arg("direct_fd"),
             py::arg("fd"), py::arg("direct") = "auto", py::arg("compute_crc32") = true,
             py::arg("progress") = py::none(), py::arg("num_writers") = 0, py::arg("region_nbytes") = 0);
}

}  // namespace sdio
