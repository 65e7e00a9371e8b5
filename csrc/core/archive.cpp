#include "core/archive.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "archive/layout.h"
#include "core/device_without_streams.h"
#include "core/direct_io_wish.h"
#include "core/kept_storages.h"
#include "core/pinned_slots.h"
#include "core/python_error.h"
#include "core/storage_table.h"
#include "core/torch.h"
#include "core/watching.h"
#include "file/system_error.h"
#include "pipeline/memory/slot_pool.h"
#include "pipeline/write/archive_image.h"
#include "pipeline/write/archive_writer.h"
#include "pipeline/write/packed_payloads.h"

namespace py = pybind11;

namespace sdio {
namespace {

// Both pools together stay below the cap: what one keeps idle gives way to what the other is about to take.
void make_room(SlotPool& pool, SlotPool& sibling, uint64_t needed_nbytes, uint64_t max_nbytes) {
  const uint64_t wanted = pool.nbytes() - pool.idle_nbytes() + needed_nbytes;
  sibling.trim(max_nbytes - std::min(max_nbytes, wanted));
  pool.trim(std::max(wanted, max_nbytes - std::min(max_nbytes, sibling.nbytes())));
}

// An archive's bytes in memory, as a Python object.
class Image {
 public:
  Image(const ArchiveContent& content, SlotPool& slots, ReleasedGil& gil)
      : image_(content, slots, [&](uint64_t) { watch(gil); }) {}

  uint64_t nbytes() const { return image_.file_nbytes(); }

  bool write_fd(int fd, const std::string& direct, const py::object& progress, size_t num_writers,
                double bytes_per_second) {
    const DirectIo direct_io = direct_io_from(direct);
    ReleasedGil gil;
    PositionalSink sink(fd, direct_io);
    WriteOptions options;
    options.num_writers = num_writers;
    options.bytes_per_second = bytes_per_second;
    write_image(image_, sink, options, [&](uint64_t done) { watch(gil, progress, done, nbytes()); });
    return sink.direct();
  }

  void write_stream(const py::object& write, const py::object& progress) {
    ReleasedGil gil;
    stream_image(
        image_,
        [&](const char* bytes, size_t size) {
          gil.with_gil([&] { call_python(write, py::memoryview::from_memory(bytes, static_cast<py::ssize_t>(size))); });
        },
        [&](uint64_t done) { watch(gil, progress, done, nbytes()); });
  }

 private:
  ArchiveImage image_;
};

// A planned archive. Holds the storages and the literal records until it is destroyed.
class Archive {
 public:
  Archive(const std::string& archive_name, const py::list& head, const py::object& storages, const py::list& tail,
          uint64_t alignment, bool compute_crc32, bool skip_data, const std::vector<std::string>& device_types)
      : literals_(py::make_tuple(py::tuple(head), py::tuple(tail))),
        storages_(storages_of(storages)),
        first_storage_record_(head.size()) {
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
  bool write_fd(int fd, const std::string& direct, const py::object& progress, size_t num_writers, size_t region_nbytes,
                double bytes_per_second) const {
    const DirectIo direct_io = direct_io_from(direct);
    WriteOptions options;
    options.num_writers = num_writers;
    options.region_nbytes = region_nbytes;
    options.bytes_per_second = bytes_per_second;
    bool was_direct = false;
    read_storages([&](KeptStorages& storages, ReleasedGil& gil) {
      PositionalSink sink(fd, direct_io);
      write_archive(*content_, sink, options, [&](uint64_t done) { watch(gil, progress, done, nbytes(), storages); });
      was_direct = sink.direct();
    });
    return was_direct;
  }

  void write_stream(const py::object& write, const py::object& progress) const {
    read_storages([&](KeptStorages& storages, ReleasedGil& gil) {
      const auto write_view = [&](const char* bytes, size_t size) {
        gil.with_gil([&] { call_python(write, py::memoryview::from_memory(bytes, static_cast<py::ssize_t>(size))); });
      };
      stream_archive(*content_, write_view, [&](uint64_t done) {
        watch(gil, progress, done, nbytes());
        if (!storages.may_move()) return;
        // What is read next: a look at all storages each time would take long where they are many.
        gil.with_gil([&] { check_records_in(done, done + kSlotNbytes); });
      });
    });
  }

  // Of the storages on each device that the pipeline copies from.
  std::map<std::string, uint64_t> device_nbytes() const {
    std::map<std::string, uint64_t> nbytes;
    if (devices_ == nullptr) return nbytes;
    for (const DeviceBytes& bytes : on_device_) {
      if (bytes.storage) nbytes[bytes.storage.device()] += bytes.nbytes;
    }
    return nbytes;
  }

  uint64_t image_nbytes() const { return ArchiveImage::nbytes_of(*content_); }
  uint64_t packed_nbytes() const { return PackedPayloads::nbytes_of(host_sources()); }

  std::unique_ptr<Image> image(uint64_t max_nbytes) const {
    SlotPool* pool = &SlotPool::snapshots();
    SlotPool* sibling = &pinned_snapshot_slots();
    if (devices_ != nullptr) std::swap(pool, sibling);
    make_room(*pool, *sibling, image_nbytes(), max_nbytes);
    std::unique_ptr<Image> image;
    read_storages([&](KeptStorages&, ReleasedGil& gil) { image = std::make_unique<Image>(*content_, *pool, gil); });
    return image;
  }

  // From now on refers to copies: of the storages on devices there, of the others in snapshot slots. False, and
  // nothing has changed, where a device has no room.
  bool clone(uint64_t max_nbytes) {
    check_storages();
    if (devices_ != nullptr) {
      clones_ = torch_of_storages().clones(on_device_);
      if (clones_ == nullptr) return false;
    }
    make_room(SlotPool::snapshots(), pinned_snapshot_slots(), packed_nbytes(), max_nbytes);
    std::unique_ptr<PackedPayloads> packed;
    read_storages([&](KeptStorages&, ReleasedGil& gil) {
      packed = std::make_unique<PackedPayloads>(host_sources(), SlotPool::snapshots(), [&](uint64_t) { watch(gil); });
    });
    packed_ = std::move(packed);
    for (size_t i = 0; i < host_records_.size(); ++i) {
      Payload& payload = content_->payloads[host_records_[i]];
      payload.kind = Payload::Kind::kPacked;
      payload.packed = packed_.get();
      payload.packed_index = i;
    }
    if (devices_ != nullptr) {
      originals_ = std::move(devices_);
      devices_ = torch_of_storages().source(clones_->records());
      on_device_ = clones_->records();
      content_->devices = devices_.get();
    }
    return true;
  }

  bool clone_done() const { return clones_ == nullptr || clones_->done(); }

  void wait_clone() {
    if (clones_ != nullptr) {
      ReleasedGil gil;
      clones_->wait();
    }
    originals_.reset();
    storages_.clear();
  }

 private:
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
          storage = storage.torch().storage_of(call_python(storage.object().attr("cpu")));
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
      payloads_.push_back(payload);
    }
    if (!on_device_.empty()) {
      on_device_.resize(specs_.size());
      devices_ = device_source(torch_of_storages(), on_device_);
    }
  }

  // Calls `read` without the GIL. Throws where a storage was resized after the plan, for example by another thread
  // while this save waited for memory, or is before `read` is done: what it wrote does not count then.
  template <typename Read>
  void read_storages(const Read& read) const {
    static const std::vector<Storage> none;
    const bool reads_copies = packed_ != nullptr;
    KeptStorages storages(reads_copies ? none : storages_, [this] { check_storages(); });
    content_->gate = storages.gate();
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
    if (packed_ != nullptr) return;
    for (size_t key = 0; key < storages_.size(); ++key) check_storage(key);
  }

  void check_storage(size_t key) const {
    const size_t record = first_storage_record_ + key;
    const Payload& payload = content_->payloads[record];
    check_unmoved(storages_[key], payload.kind == Payload::Kind::kMemory ? payload.data : nullptr,
                  content_->layout.placement(record).nbytes, "the storage of record data/", key);
  }

  // Those that have a byte in [begin, end) of the file.
  void check_records_in(uint64_t begin, uint64_t end) const {
    if (begin >= nbytes()) return;
    const ArchiveLayout& layout = content_->layout;
    for (size_t record = layout.record_at(begin); record < layout.num_records(); ++record) {
      if (layout.placement(record).header_offset >= end) return;
      if (record >= first_storage_record_ && record - first_storage_record_ < storages_.size()) {
        check_storage(record - first_storage_record_);
      }
    }
  }

  std::vector<PackedSource> host_sources() const {
    std::vector<PackedSource> sources;
    sources.reserve(host_records_.size());
    for (const size_t record : host_records_) {
      sources.push_back({content_->payloads[record].data, content_->layout.placement(record).nbytes});
    }
    return sources;
  }

  py::object literals_;
  std::vector<Storage> storages_;
  const size_t first_storage_record_;
  std::vector<RecordSpec> specs_;       // until the layout takes them
  std::vector<Payload> payloads_;       // until content_ takes them
  std::vector<size_t> host_records_;    // the storages that are read where they lie
  std::vector<DeviceBytes> on_device_;  // by record, where there are any
  std::unique_ptr<DeviceSource> devices_;
  std::unique_ptr<DeviceClones> clones_;
  std::unique_ptr<DeviceSource> originals_;  // until they have been cloned
  std::unique_ptr<PackedPayloads> packed_;
  std::unique_ptr<ArchiveContent> content_;
};

}  // namespace

void bind_archive(py::module_& module) {
  py::class_<Archive>(module, "Archive")
      .def(py::init<const std::string&, const py::list&, const py::object&, const py::list&, uint64_t, bool, bool,
                    const std::vector<std::string>&>(),
           py::arg("archive_name"), py::arg("head"), py::arg("storages"), py::arg("tail"), py::kw_only(),
           py::arg("alignment"), py::arg("compute_crc32"), py::arg("skip_data") = false,
           py::arg("device_types") = std::vector<std::string>())
      .def_property_readonly("nbytes", &Archive::nbytes)
      .def("write_fd", &Archive::write_fd, py::arg("fd"), py::kw_only(), py::arg("direct") = "auto",
           py::arg("progress") = py::none(), py::arg("num_writers") = 0, py::arg("region_nbytes") = 0,
           py::arg("bytes_per_second") = 0.0)
      .def("write_stream", &Archive::write_stream, py::arg("write"), py::kw_only(), py::arg("progress") = py::none())
      .def_property_readonly("device_nbytes", &Archive::device_nbytes)
      .def_property_readonly("image_nbytes", &Archive::image_nbytes)
      .def_property_readonly("packed_nbytes", &Archive::packed_nbytes)
      .def("image", &Archive::image, py::kw_only(), py::arg("max_nbytes"))
      .def("clone", &Archive::clone, py::kw_only(), py::arg("max_nbytes"))
      .def("clone_done", &Archive::clone_done)
      .def("wait_clone", &Archive::wait_clone);

  py::class_<Image>(module, "Image")
      .def_property_readonly("nbytes", &Image::nbytes)
      .def("write_fd", &Image::write_fd, py::arg("fd"), py::kw_only(), py::arg("direct") = "auto",
           py::arg("progress") = py::none(), py::arg("num_writers") = 0, py::arg("bytes_per_second") = 0.0)
      .def("write_stream", &Image::write_stream, py::arg("write"), py::kw_only(), py::arg("progress") = py::none());

  module.def("snapshot_pool_nbytes", [] { return SlotPool::snapshots().nbytes() + pinned_snapshot_slots().nbytes(); });
}

}  // namespace sdio
