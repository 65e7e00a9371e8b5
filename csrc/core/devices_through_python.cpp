#include "core/devices_through_python.h"

#include <optional>
#include <utility>

#include "core/pinned_slots.h"
#include "core/python_error.h"

namespace py = pybind11;

namespace sdio {
namespace {

uintptr_t address(const char* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// As Py_BuildValue takes it.
unsigned long long as_long_long(uint64_t number) { return number; }

class PinnedByPython final : public SlotMemory {
 public:
  PinnedByPython(py::object owner, uintptr_t data) : owner_(std::move(owner)) { data_ = reinterpret_cast<char*>(data); }

 private:
  SharedObject owner_;
};

py::list listed(const std::vector<DeviceBytes>& records) {
  std::vector<py::object> storages;
  storages.reserve(records.size());
  for (const DeviceBytes& record : records) {
    storages.push_back(record.storage ? record.storage.object() : py::object(py::none()));
  }
  return list_of(records.size(), [&](size_t i) {
    if (storages[i].is_none()) return Py_NewRef(Py_None);
    return Py_BuildValue("(OKK)", storages[i].ptr(), as_long_long(records[i].offset), as_long_long(records[i].nbytes));
  });
}

class PythonSource final : public DeviceSource {
 public:
  explicit PythonSource(py::object source) : source_(std::move(source)) {}

  void copy(const std::vector<DevicePiece>& pieces) override {
    const std::optional<SlotPool::Handle> bounce = slot_to_gather(pieces);
    in_python([&] {
      const py::list list = list_of(pieces.size(), [&](size_t i) {
        const DevicePiece& piece = pieces[i];
        return Py_BuildValue("(KKKK)", as_long_long(piece.record), as_long_long(piece.record_offset),
                             as_long_long(piece.nbytes), as_long_long(address(piece.destination)));
      });
      drop(call_method(source_.get(), "copy", list,
                       bounce ? py::object(py::int_(address(bounce->data()))) : py::object(py::none())));
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
    in_python([&] { drop(call_method(copies_.get(), "wait")); });
  }

 private:
  SharedObject copies_;
};

class PythonDestination final : public StorageDestination {
 public:
  explicit PythonDestination(py::object destination) : destination_(std::move(destination)) {}

  std::unique_ptr<QueuedCopies> copy(const std::vector<ArrivedPiece>& pieces) override {
    return in_python([&]() -> std::unique_ptr<QueuedCopies> {
      const py::list list = list_of(pieces.size(), [&](size_t i) {
        const ArrivedPiece& piece = pieces[i];
        return Py_BuildValue("(KKKK)", as_long_long(piece.request), as_long_long(piece.payload_offset),
                             as_long_long(piece.nbytes), as_long_long(address(piece.source)));
      });
      return std::make_unique<PythonCopies>(call_method(destination_.get(), "copy", list));
    });
  }

  SlotPool& slots() override { return pinned_slots(); }

  py::list storages() const override { return py::list(call_method(destination_.get(), "storages")); }

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
  bool done() const override { return call_method(clones_.get(), "done").cast<bool>(); }
  void wait() const override {
    in_python([&] { drop(call_method(clones_.get(), "wait")); });
  }

 private:
  SharedObject clones_;
  std::vector<DeviceBytes> records_;
};

}  // namespace

std::unique_ptr<SlotMemory> pin_through_python(const py::object& copies) {
  const py::object pinned = call_method(copies, "pinned", kSlotNbytes);
  if (pinned.is_none()) return nullptr;
  auto [owner, data] = pinned.cast<std::pair<py::object, uintptr_t>>();
  return std::make_unique<PinnedByPython>(std::move(owner), data);
}

std::unique_ptr<DeviceSource> source_through_python(const py::object& copies, const std::vector<DeviceBytes>& records) {
  return std::make_unique<PythonSource>(call_method(copies, "source", listed(records)));
}

std::unique_ptr<StorageDestination> destination_through_python(const py::object& copies, const std::string& device,
                                                               const std::vector<uint64_t>& sizes) {
  const py::list listed_sizes = list_of(sizes.size(), [&](size_t i) { return PyLong_FromUnsignedLongLong(sizes[i]); });
  py::object destination = call_method(copies, "destination", device, listed_sizes);
  if (destination.is_none()) return nullptr;
  return std::make_unique<PythonDestination>(std::move(destination));
}

std::unique_ptr<DeviceClones> clones_through_python(const py::object& copies, const Torch& torch,
                                                    const std::vector<DeviceBytes>& originals) {
  py::object clones = call_method(copies, "clones", listed(originals));
  if (clones.is_none()) return nullptr;
  return std::make_unique<PythonClones>(std::move(clones), torch);
}

}  // namespace sdio
