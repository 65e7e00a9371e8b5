#include "core/devices_through_python.h"

#include <optional>
#include <utility>

#include "core/pinned_slots.h"
#include "core/python_error.h"

namespace py = pybind11;

namespace sdio {
namespace {

uintptr_t address(const char* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

class PinnedByPython final : public SlotMemory {
 public:
  PinnedByPython(py::object owner, uintptr_t data) : owner_(std::move(owner)) { data_ = reinterpret_cast<char*>(data); }

 private:
  SharedObject owner_;
};

py::list listed(const std::vector<DeviceBytes>& records) {
  py::list list(records.size());
  for (size_t i = 0; i < records.size(); ++i) {
    const DeviceBytes& record = records[i];
    list[i] = record.storage ? py::object(py::make_tuple(record.storage.object(), record.offset, record.nbytes))
                             : py::object(py::none());
  }
  return list;
}

class PythonSource final : public DeviceSource {
 public:
  explicit PythonSource(py::object source) : source_(std::move(source)) {}

  void copy(const std::vector<DevicePiece>& pieces) override {
    const std::optional<SlotPool::Handle> bounce = slot_to_gather(pieces);
    in_python([&] {
      py::list list(pieces.size());
      for (size_t i = 0; i < pieces.size(); ++i) {
        const DevicePiece& piece = pieces[i];
        list[i] = py::make_tuple(piece.record, piece.record_offset, piece.nbytes, address(piece.destination));
      }
      call_python(source_.get().attr("copy"), list,
                  bounce ? py::object(py::int_(address(bounce->data()))) : py::object(py::none()));
    });
  }

  SlotPool& slots() override { return pinned_slots(); }

 private:
  SharedObject source_;
};

class PythonCopies final : public QueuedCopies {
 public:
  explicit PythonCopies(py::object copies) : copies_(std::move(copies)) {}

  void wait() override {
    in_python([&] { call_python(copies_.get().attr("wait")); });
  }

 private:
  SharedObject copies_;
};

class PythonDestination final : public StorageDestination {
 public:
  explicit PythonDestination(py::object destination) : destination_(std::move(destination)) {}

  std::unique_ptr<QueuedCopies> copy(const std::vector<ArrivedPiece>& pieces) override {
    return in_python([&]() -> std::unique_ptr<QueuedCopies> {
      py::list list(pieces.size());
      for (size_t i = 0; i < pieces.size(); ++i) {
        const ArrivedPiece& piece = pieces[i];
        list[i] = py::make_tuple(piece.request, piece.payload_offset, piece.nbytes, address(piece.source));
      }
      return std::make_unique<PythonCopies>(call_python(destination_.get().attr("copy"), list));
    });
  }

  SlotPool& slots() override { return pinned_slots(); }

  py::list storages() const override { return py::list(call_python(destination_.get().attr("storages"))); }

 private:
  SharedObject destination_;
};

class PythonClones final : public DeviceClones {
 public:
  PythonClones(py::object clones, const Torch& torch) : clones_(std::move(clones)) {
    for (const py::handle record : py::list(clones_.get().attr("records"))) {
      records_.emplace_back();
      if (record.is_none()) continue;
      const auto [storage, offset, nbytes] = record.cast<std::tuple<py::object, uint64_t, uint64_t>>();
      records_.back() = {torch.storage_of(storage), offset, nbytes};
    }
  }

  const std::vector<DeviceBytes>& records() const override { return records_; }
  bool done() const override { return call_python(clones_.get().attr("done")).cast<bool>(); }
  void wait() const override {
    in_python([&] { call_python(clones_.get().attr("wait")); });
  }

 private:
  SharedObject clones_;
  std::vector<DeviceBytes> records_;
};

}  // namespace

std::unique_ptr<SlotMemory> pin_through_python(const py::object& copies) {
  const py::object pinned = call_python(copies.attr("pinned"), kSlotNbytes);
  if (pinned.is_none()) return nullptr;
  auto [owner, data] = pinned.cast<std::pair<py::object, uintptr_t>>();
  return std::make_unique<PinnedByPython>(std::move(owner), data);
}

std::unique_ptr<DeviceSource> source_through_python(const py::object& copies, const std::vector<DeviceBytes>& records) {
  return std::make_unique<PythonSource>(call_python(copies.attr("source"), listed(records)));
}

std::unique_ptr<StorageDestination> destination_through_python(const py::object& copies, const std::string& device,
                                                               const std::vector<uint64_t>& sizes) {
  py::list listed_sizes(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) listed_sizes[i] = sizes[i];
  py::object destination = call_python(copies.attr("destination"), device, listed_sizes);
  if (destination.is_none()) return nullptr;
  return std::make_unique<PythonDestination>(std::move(destination));
}

std::unique_ptr<DeviceClones> clones_through_python(const py::object& copies, const Torch& torch,
                                                    const std::vector<DeviceBytes>& originals) {
  py::object clones = call_python(copies.attr("clones"), listed(originals));
  if (clones.is_none()) return nullptr;
  return std::make_unique<PythonClones>(std::move(clones), torch);
}

}  // namespace sdio
