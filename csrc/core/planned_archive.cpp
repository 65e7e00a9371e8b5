#include "core/planned_archive.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "archive/layout.h"
#include "core/device_without_streams.h"
#include "core/direct_io_wish.h"
#include "core/kept_storages.h"
#include "core/python_error.h"
#include "core/snapshot.h"
#include "core/storage_table.h"
#include "core/torch.h"
#include "core/watching.h"
#include "file/system_error.h"
#include "pipeline/memory/slot_pool.h"
#include "pipeline/write/archive_writer.h"
#include "pipeline/write/host_snapshot.h"
#include "pipeline/write/payload_copies.h"
#include "pipeline/write/records.h"

namespace py = pybind11;

namespace sdio {
namespace {

// A planned archive. Holds the storages and the literal records until it is destroyed.
class PlannedArchive {
 public:
  PlannedArchive(const std::string& archive_name, const py::list& head, const py::object& storages,
                 const py::list& tail, uint64_t alignment, bool compute_crc32, bool skip_data,
                 const std::vector<std::string>& device_types)
      : literals_(py::make_tuple(py::tuple(head), py::tuple(tail))),
        storages_(storages_of(storages)),
        first_storage_record_(head.size()) {
    const size_t num_records = head.size() + storages_.size() + tail.size();
    specs_.reserve(num_records);
    records_.payloads.reserve(num_records);
    add_literals(head);
    add_storages(skip_data, device_types);
    add_literals(tail);
    records_.layout = std::make_shared<const ArchiveLayout>(archive_name, std::move(specs_), alignment);
    records_.compute_crc32 = compute_crc32;
    records_.devices = devices_.get();
  }

  uint64_t nbytes() const { return records_.layout->file_nbytes(); }

  // Returns whether the file took direct I/O.
  bool write_fd(int fd, const std::string& direct, const py::object& progress, double bytes_per_second) {
    const DirectIo direct_io = direct_io_from(direct);
    WriteOptions options;
    options.bytes_per_second = bytes_per_second;
    bool was_direct = false;
    read_storages([&](KeptStorages& storages, ReleasedGil& gil) {
      PositionalSink sink(fd, direct_io);
      write_archive(records_, sink, options, [&](uint64_t done) { watch(gil, progress, done, nbytes(), storages); });
      was_direct = sink.direct();
    });
    return was_direct;
  }

  void write_stream(const py::object& write, const py::object& progress) {
    read_storages([&](KeptStorages& storages, ReleasedGil& gil) {
      const auto write_view = [&](const char* bytes, size_t size) { call_with_view(gil, write, bytes, size); };
      stream_archive(records_, write_view, [&](uint64_t done) {
        watch(gil, progress, done, nbytes());
        if (!storages.may_move()) return;
        // Only those that are read next: where they are many, a look at all of them each time would take long.
        gil.with_gil([&] { check_records_in(done, done + kSlotNbytes); });
      });
    });
  }

  // The number of bytes of storages on each device that the pipeline copies from.
  std::map<std::string, uint64_t> device_nbytes() const {
    std::map<std::string, uint64_t> nbytes;
    if (devices_ == nullptr) return nbytes;
    for (const DeviceBytes& bytes : on_device_) {
      if (bytes.storage) nbytes[bytes.storage.device()] += bytes.nbytes;
    }
    return nbytes;
  }

  // The host memory that snapshot() takes.
  uint64_t snapshot_nbytes(bool on_devices) const {
    return on_devices ? PayloadCopies::nbytes_of(host_sources()) : HostSnapshot::nbytes_of(records_);
  }

  // Null where a device has no room for copies of its storages.
  std::unique_ptr<Snapshot> snapshot(bool on_devices, uint64_t max_nbytes) {
    return on_devices ? snapshot_on_devices(max_nbytes) : snapshot_in_host_memory(max_nbytes);
  }

 private:
  void add_literals(const py::list& records) {
    for (const py::handle record : records) {
      const auto [name, bytes] = record.cast<std::pair<std::string, py::bytes>>();
      Payload payload;
      payload.data = PyBytes_AS_STRING(bytes.ptr());  // of the object in literals_
      specs_.push_back({name, static_cast<uint64_t>(PyBytes_GET_SIZE(bytes.ptr()))});
      records_.payloads.push_back(payload);
    }
  }

  void add_storages(bool skip_data, const std::vector<std::string>& device_types) {
    for (size_t key = 0; key < storages_.size(); ++key) {
      Storage& storage = storages_[key];
      Payload payload;
      if (skip_data) {
        payload.kind = Payload::Kind::kHole;
      } else if (!storage.on_host()) {
        const std::string device = storage.device();
        const std::string type = device.substr(0, device.find(':'));
        if (std::find(device_types.begin(), device_types.end(), type) != device_types.end()) {
          payload.kind = Payload::Kind::kDevice;
        } else {
          storage = storage.torch().storage_of(call_method(storage.object(), "cpu"));
        }
      }
      const StorageBytes bytes = storage.bytes();
      if (payload.kind == Payload::Kind::kDevice) {
        on_device_.resize(specs_.size());
        on_device_.push_back({storage, 0, bytes.nbytes});
      } else if (payload.kind == Payload::Kind::kMemory) {
        payload.data = bytes.data;
        host_records_.push_back(specs_.size());
      }
      specs_.push_back({"data/" + std::to_string(key), bytes.nbytes});
      records_.payloads.push_back(payload);
    }
    if (!on_device_.empty()) {
      on_device_.resize(specs_.size());
      devices_ = device_source(torch_of_storages(), on_device_);
    }
  }

  std::unique_ptr<Snapshot> snapshot_in_host_memory(uint64_t max_nbytes) {
    SlotPool& slots = snapshot_slots(devices_ != nullptr, HostSnapshot::nbytes_of(records_), max_nbytes);
    std::unique_ptr<Snapshot> snapshot;
    read_storages([&](KeptStorages&, ReleasedGil& gil) {
      snapshot = std::make_unique<SnapshotInHostMemory>(records_, slots, [&](uint64_t) { watch(gil); });
    });
    return snapshot;
  }

  std::unique_ptr<Snapshot> snapshot_on_devices(uint64_t max_nbytes) {
    check_storages();
    std::unique_ptr<DeviceClones> clones;
    std::unique_ptr<DeviceSource> source;
    if (devices_ != nullptr) {
      clones = torch_of_storages().clones(on_device_);
      if (clones == nullptr) return nullptr;
      source = torch_of_storages().source(clones->records());
    }
    const std::vector<HostBytes> sources = host_sources();
    SlotPool& slots = snapshot_slots(/*pinned=*/false, PayloadCopies::nbytes_of(sources), max_nbytes);
    std::unique_ptr<PayloadCopies> copies;
    read_storages([&](KeptStorages&, ReleasedGil& gil) {
      copies = std::make_unique<PayloadCopies>(sources, slots, [&](uint64_t) { watch(gil); });
    });
    return std::make_unique<SnapshotOnDevices>(records_, literals_, host_records_, std::move(copies), on_device_,
                                               std::move(clones), std::move(source));
  }

  // Calls `read` without the GIL. Throws where a storage was resized after the plan, for example by another thread
  // while this save waited for memory, or is before `read` is done: what it wrote does not count then.
  template <typename Read>
  void read_storages(const Read& read) {
    KeptStorages storages(storages_, [this] { check_storages(); });
    records_.gate = storages.gate();
    try {
      ReleasedGil gil;
      read(storages, gil);
    } catch (const SystemError&) {
      storages.check();  // the kernel may have found memory gone that was a storage's
      throw;
    }
    storages.check();
  }

  const Torch& torch_of_storages() const { return storages_.front().torch(); }

  void check_storages() const {
    for (size_t key = 0; key < storages_.size(); ++key) check_storage(key);
  }

  void check_storage(size_t key) const {
    const size_t record = first_storage_record_ + key;
    const Payload& payload = records_.payloads[record];
    check_unmoved(storages_[key], payload.kind == Payload::Kind::kMemory ? payload.data : nullptr,
                  records_.layout->placement(record).nbytes, "the storage of record data/", key);
  }

  // Checks the storages that have a byte in [begin, end) of the file.
  void check_records_in(uint64_t begin, uint64_t end) const {
    if (begin >= nbytes()) return;
    const ArchiveLayout& layout = *records_.layout;
    for (size_t record = layout.record_at(begin); record < layout.num_records(); ++record) {
      if (layout.placement(record).header_offset >= end) return;
      if (record >= first_storage_record_ && record - first_storage_record_ < storages_.size()) {
        check_storage(record - first_storage_record_);
      }
    }
  }

  std::vector<HostBytes> host_sources() const {
    std::vector<HostBytes> sources;
    sources.reserve(host_records_.size());
    for (const size_t record : host_records_) {
      sources.push_back({records_.payloads[record].data, records_.layout->placement(record).nbytes});
    }
    return sources;
  }

  py::object literals_;
  std::vector<Storage> storages_;
  const size_t first_storage_record_;
  std::vector<RecordSpec> specs_;       // until the layout takes them
  std::vector<size_t> host_records_;    // the storages that are read where they lie
  std::vector<DeviceBytes> on_device_;  // by record, where there are any
  std::unique_ptr<DeviceSource> devices_;
  Records records_;
};

}  // namespace

void bind_planned_archive(py::module_& module) {
  py::class_<PlannedArchive>(module, "PlannedArchive")
      .def(py::init<const std::string&, const py::list&, const py::object&, const py::list&, uint64_t, bool, bool,
                    const std::vector<std::string>&>(),
           py::arg("archive_name"), py::arg("head"), py::arg("storages"), py::arg("tail"), py::kw_only(),
           py::arg("alignment"), py::arg("compute_crc32"), py::arg("skip_data") = false,
           py::arg("device_types") = std::vector<std::string>())
      .def_property_readonly("nbytes", &PlannedArchive::nbytes)
      .def("write_fd", &PlannedArchive::write_fd, py::arg("fd"), py::kw_only(), py::arg("direct") = "auto",
           py::arg("progress") = py::none(), py::arg("bytes_per_second") = 0.0)
      .def("write_stream", &PlannedArchive::write_stream, py::arg("write"), py::kw_only(),
           py::arg("progress") = py::none())
      .def_property_readonly("device_nbytes", &PlannedArchive::device_nbytes)
      .def("snapshot_nbytes", &PlannedArchive::snapshot_nbytes, py::kw_only(), py::arg("on_devices"))
      .def("snapshot", &PlannedArchive::snapshot, py::kw_only(), py::arg("on_devices"), py::arg("max_nbytes"));
}

}  // namespace sdio
