#include "core/planned_files.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
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
#include "core/wanted_digest.h"
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

// A planned file: bytes, and ranges of storages, one after the other. Holds them until it is destroyed.
class PlannedFile {
 public:
  virtual ~PlannedFile() = default;
  PlannedFile(const PlannedFile&) = delete;
  PlannedFile& operator=(const PlannedFile&) = delete;

  uint64_t nbytes() const { return records_.layout->file_nbytes(); }

  // Returns whether the file took direct I/O.
  bool write_fd(int fd, const std::string& direct, const py::object& progress, double bytes_per_second,
                const py::object& sha256) {
    const DirectIo direct_io = direct_io_from(direct);
    WantedDigest digest(sha256);
    WriteOptions options;
    options.bytes_per_second = bytes_per_second;
    options.digest = digest.get();
    bool was_direct = false;
    read_storages([&](KeptStorages& storages, ReleasedGil& gil) {
      PositionalSink sink(fd, direct_io);
      write_archive(records_, sink, options, [&](uint64_t done) { watch(gil, progress, done, nbytes(), storages); });
      was_direct = sink.direct();
    });
    digest.give();
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

 protected:
  PlannedFile() = default;

  void add_literal(const py::handle& bytes) {
    literals_.append(bytes);
    Payload payload;
    payload.data = PyBytes_AS_STRING(bytes.ptr());
    records_.payloads.push_back(payload);
    sizes_.push_back(static_cast<uint64_t>(PyBytes_GET_SIZE(bytes.ptr())));
  }

  // The `nbytes` from `offset` on, which it has: `whole` is what it holds now.
  void add_storage(const Storage& storage, const StorageBytes& whole, uint64_t offset, uint64_t nbytes,
                   bool is_hole = false) {
    const size_t record = records_.payloads.size();
    Payload payload;
    if (is_hole) {
      payload.kind = Payload::Kind::kHole;
    } else if (!storage.on_host()) {
      payload.kind = Payload::Kind::kDevice;
      on_device_.resize(record);
      on_device_.push_back({storage, offset, nbytes});
    } else {
      payload.data = whole.data + offset;
      host_records_.push_back(record);
    }
    records_.payloads.push_back(payload);
    sizes_.push_back(nbytes);
    storages_.push_back(storage);
    planned_.push_back({record, whole});
  }

  // Before anything else is called; the sizes are those of the layout's records, in order.
  void complete(std::shared_ptr<const FileLayout> layout) {
    if (!on_device_.empty()) {
      on_device_.resize(records_.payloads.size());
      devices_ = device_source(storages_.front().torch(), on_device_);
      records_.devices = devices_.get();
    }
    records_.layout = std::move(layout);
  }

  const std::vector<uint64_t>& sizes() const { return sizes_; }

  // Of a record that is a range of a storage, for messages.
  virtual std::string what(size_t record) const = 0;

  Records records_;

 private:
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
    return std::make_unique<SnapshotOnDevices>(records_, py::object(literals_), host_records_, std::move(copies),
                                               on_device_, std::move(clones), std::move(source));
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
    for (size_t i = 0; i < storages_.size(); ++i) check_storage(i);
  }

  void check_storage(size_t i) const {
    const size_t record = planned_[i].first;
    const StorageBytes& whole = planned_[i].second;
    const bool is_read_in_place = records_.payloads[record].kind == Payload::Kind::kMemory;
    check_unmoved(storages_[i], is_read_in_place ? whole.data : nullptr, whole.nbytes, [&] { return what(record); });
  }

  // Checks the storages that have a byte in [begin, end) of the file.
  void check_records_in(uint64_t begin, uint64_t end) const {
    if (begin >= nbytes()) return;
    const FileLayout& layout = *records_.layout;
    const size_t first = layout.record_at(begin);
    auto next = std::lower_bound(planned_.begin(), planned_.end(), first,
                                 [](const auto& planned, size_t record) { return planned.first < record; });
    for (; next != planned_.end() && layout.placement(next->first).header_offset < end; ++next) {
      check_storage(static_cast<size_t>(next - planned_.begin()));
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

  py::list literals_;
  std::vector<Storage> storages_;
  std::vector<std::pair<size_t, StorageBytes>> planned_;  // of each storage: its record, and what it held
  std::vector<uint64_t> sizes_;                           // of all records
  std::vector<size_t> host_records_;                      // the storages that are read where they lie
  std::vector<DeviceBytes> on_device_;                    // by record, where there are any
  std::unique_ptr<DeviceSource> devices_;
};

// Brings storages to the CPU whose devices the pipeline does not copy from; one of which several parts are wanted once.
class StoragesToRead {
 public:
  explicit StoragesToRead(const std::vector<std::string>& device_types) : device_types_(device_types) {}

  Storage operator()(const Storage& storage) {
    if (storage.on_host()) return storage;
    const std::string device = storage.device();
    const std::string type = device.substr(0, device.find(':'));
    if (std::find(device_types_.begin(), device_types_.end(), type) != device_types_.end()) return storage;
    Storage& copy = copies_[storage.identity()];
    if (!copy) copy = storage.torch().storage_of(call_method(storage.object(), "cpu"));
    return copy;
  }

 private:
  const std::vector<std::string>& device_types_;
  std::unordered_map<const void*, Storage> copies_;
};

// An archive of torch.save.
class PlannedArchive final : public PlannedFile {
 public:
  PlannedArchive(const std::string& archive_name, const py::list& head, const py::object& storage_list,
                 const py::list& tail, uint64_t alignment, bool compute_crc32, bool skip_data,
                 const std::vector<std::string>& device_types) {
    std::vector<RecordSpec> specs;
    StoragesToRead to_read(device_types);
    add_literals(head, specs);
    for (const Storage& original : storages_of(storage_list)) {
      const Storage storage = skip_data ? original : to_read(original);
      const StorageBytes bytes = storage.bytes();
      add_storage(storage, bytes, 0, bytes.nbytes, /*is_hole=*/skip_data);
      specs.push_back({"data/" + std::to_string(specs.size() - head.size()), bytes.nbytes});
    }
    add_literals(tail, specs);
    auto layout = std::make_shared<const ArchiveLayout>(archive_name, std::move(specs), alignment);
    layout_ = layout.get();
    records_.compute_crc32 = compute_crc32;
    complete(std::move(layout));
  }

 private:
  void add_literals(const py::list& records, std::vector<RecordSpec>& specs) {
    for (const py::handle record : records) {
      const auto [name, bytes] = record.cast<std::pair<std::string, py::bytes>>();
      add_literal(bytes);
      specs.push_back({name, sizes().back()});
    }
  }

  std::string what(size_t record) const override { return "the storage of record " + layout_->name(record); }

  const ArchiveLayout* layout_ = nullptr;
};

// Parts that follow each other without anything between them.
class GaplessFile final : public PlannedFile {
 public:
  GaplessFile(const py::sequence& parts, const std::vector<std::string>& device_types) {
    StoragesToRead to_read(device_types);
    names_.reserve(parts.size());
    for (const py::handle part : parts) {
      if (PyBytes_Check(part.ptr())) {
        names_.emplace_back();
        add_literal(part);
        continue;
      }
      const auto fields = part.cast<py::tuple>();
      if (fields.size() != 4) throw py::value_error("a range of a storage has four fields");
      names_.push_back(fields[0].cast<std::string>());
      const Storage storage = to_read(torch().storage_of(fields[1]));
      const StorageBytes bytes = storage.bytes();
      const auto offset = fields[2].cast<uint64_t>(), nbytes = fields[3].cast<uint64_t>();
      if (offset > bytes.nbytes || nbytes > bytes.nbytes - offset) {
        throw py::value_error(names_.back() + " is longer than its storage");
      }
      add_storage(storage, bytes, offset, nbytes);
    }
    complete(std::make_shared<const FileLayout>(sizes()));
  }

 private:
  std::string what(size_t record) const override { return "the storage of " + names_[record]; }

  std::vector<std::string> names_;  // by record; of bytes empty
};

}  // namespace

void bind_planned_files(py::module_& module) {
  py::class_<PlannedFile>(module, "PlannedFile")
      .def_property_readonly("nbytes", &PlannedFile::nbytes)
      .def("write_fd", &PlannedFile::write_fd, py::arg("fd"), py::kw_only(), py::arg("direct") = "auto",
           py::arg("progress") = py::none(), py::arg("bytes_per_second") = 0.0, py::arg("sha256") = py::none())
      .def("write_stream", &PlannedFile::write_stream, py::arg("write"), py::kw_only(),
           py::arg("progress") = py::none())
      .def_property_readonly("device_nbytes", &PlannedFile::device_nbytes)
      .def("snapshot_nbytes", &PlannedFile::snapshot_nbytes, py::kw_only(), py::arg("on_devices"))
      .def("snapshot", &PlannedFile::snapshot, py::kw_only(), py::arg("on_devices"), py::arg("max_nbytes"));

  py::class_<PlannedArchive, PlannedFile>(module, "PlannedArchive")
      .def(py::init<const std::string&, const py::list&, const py::object&, const py::list&, uint64_t, bool, bool,
                    const std::vector<std::string>&>(),
           py::arg("archive_name"), py::arg("head"), py::arg("storages"), py::arg("tail"), py::kw_only(),
           py::arg("alignment"), py::arg("compute_crc32"), py::arg("skip_data") = false,
           py::arg("device_types") = std::vector<std::string>());

  py::class_<GaplessFile, PlannedFile>(module, "GaplessFile")
      .def(py::init<const py::sequence&, const std::vector<std::string>&>(), py::arg("parts"), py::kw_only(),
           py::arg("device_types") = std::vector<std::string>());
}

}  // namespace sdio
