#include "core/torch_through_table.h"

#include <functional>
#include <new>
#include <stdexcept>
#include <utility>

#include "boundary/torch_functions.h"
#include "core/owned.h"
#include "core/pinned_slots.h"
#include "pipeline/threads/profiled_step.h"

namespace py = pybind11;

namespace sdio {
namespace {

using Functions = sdio_torch_functions;

sdio_storage* storage_in(void* held) { return static_cast<sdio_storage*>(held); }

[[noreturn]] void raise(const sdio_error& error) { throw std::runtime_error(error.message); }

void check(sdio_status status, const sdio_error& error) {
  if (status != SDIO_OK) raise(error);
}

// A handle and the function that releases it.
template <typename Handle>
using Owned = std::unique_ptr<Handle, void (*)(Handle*)>;

std::vector<sdio_device_bytes> borrowed(const std::vector<DeviceBytes>& records) {
  std::vector<sdio_device_bytes> bytes(records.size());
  for (size_t i = 0; i < records.size(); ++i) {
    bytes[i] = {storage_in(records[i].storage.held()), records[i].offset, records[i].nbytes};
  }
  return bytes;
}

class FixedThroughTable final : public FixedStorages {
 public:
  FixedThroughTable(sdio_fixed* fixed, const Functions& functions) : fixed_(fixed, functions.unfix) {}

 private:
  const Owned<sdio_fixed> fixed_;
};

class PinnedThroughTable final : public SlotMemory {
 public:
  PinnedThroughTable(sdio_pinned* pinned, char* data, const Functions& functions) : pinned_(pinned, functions.unpin) {
    data_ = data;
  }

 private:
  const Owned<sdio_pinned> pinned_;
};

class TableSource final : public DeviceSource {
 public:
  TableSource(sdio_source* source, const Functions& functions)
      : functions_(functions), source_(source, functions.source_delete) {}

  void copy(const std::vector<DevicePiece>& pieces) override {
    const std::optional<SlotPool::Handle> bounce = slot_to_gather(pieces);
    std::vector<sdio_device_piece> listed(pieces.size());
    for (size_t i = 0; i < pieces.size(); ++i) {
      listed[i] = {pieces[i].record, pieces[i].record_offset, pieces[i].nbytes, pieces[i].destination};
    }
    sdio_error error{};
    const sdio_status status =
        functions_.source_copy(source_.get(), listed.data(), listed.size(), bounce ? bounce->data() : nullptr, &error);
    check(status, error);
  }

  SlotPool& slots() override { return pinned_slots(); }

 private:
  const Functions& functions_;
  const Owned<sdio_source> source_;
};

class TableCopies final : public QueuedCopies {
 public:
  TableCopies(sdio_copies* copies, const Functions& functions)
      : functions_(functions), copies_(copies, functions.copies_delete) {}

  void wait() override {
    sdio_error error{};
    const sdio_status status = functions_.copies_wait(copies_.get(), &error);
    check(status, error);
  }

 private:
  const Functions& functions_;
  const Owned<sdio_copies> copies_;
};

class TableDestination final : public StorageDestination {
 public:
  TableDestination(sdio_destination* destination, size_t num_requests, const Functions& functions)
      : functions_(functions), destination_(destination, functions.destination_delete), num_requests_(num_requests) {}

  std::unique_ptr<QueuedCopies> copy(const std::vector<ArrivedPiece>& pieces) override {
    std::vector<sdio_arrived_piece> listed(pieces.size());
    for (size_t i = 0; i < pieces.size(); ++i) {
      listed[i] = {pieces[i].request, pieces[i].payload_offset, pieces[i].nbytes, pieces[i].source};
    }
    sdio_status status = SDIO_OK;
    sdio_error error{};
    sdio_copies* const copies =
        functions_.destination_copy(destination_.get(), listed.data(), listed.size(), &status, &error);
    if (copies == nullptr) raise(error);
    return std::make_unique<TableCopies>(copies, functions_);
  }

  SlotPool& slots() override { return pinned_slots(); }

  py::list storages() const override {
    py::list list = list_of(num_requests_, [](size_t) { return Py_NewRef(Py_None); });
    for (size_t i = 0; i < num_requests_; ++i) {
      list[i] = owned(functions_.destination_storage(destination_.get(), i));
    }
    return list;
  }

 private:
  const Functions& functions_;
  const Owned<sdio_destination> destination_;
  const size_t num_requests_;
};

class TableClones final : public DeviceClones {
 public:
  TableClones(sdio_clones* clones, size_t num_records, const Functions& functions, const Torch& torch)
      : functions_(functions), clones_(clones, functions.clones_delete), records_(num_records) {
    for (size_t i = 0; i < num_records; ++i) {
      const sdio_device_bytes bytes = functions_.clones_of(clones, i);
      if (bytes.storage == nullptr) continue;
      records_[i] = {Storage(torch, functions_.storage_retain(bytes.storage), /*on_host=*/false), bytes.offset,
                     bytes.nbytes};
    }
  }

  const std::vector<DeviceBytes>& records() const override { return records_; }
  bool done() const override { return functions_.clones_done(clones_.get()) != 0; }
  void wait() const override {
    sdio_error error{};
    const sdio_status status = functions_.clones_wait(clones_.get(), &error);
    check(status, error);
  }

 private:
  const Functions& functions_;
  const Owned<sdio_clones> clones_;
  std::vector<DeviceBytes> records_;
};

class TableSteps final : public StepRecorder {
 public:
  explicit TableSteps(const Functions& functions) : functions_(functions) {}

  std::unique_ptr<Open> begin(const char* name) override {
    sdio_step* const step = functions_.step_begin(name);
    if (step == nullptr) return nullptr;
    return std::make_unique<Step>(step, functions_);
  }

  std::function<void()> for_another_thread() override {
    const std::shared_ptr<sdio_recording> recording(functions_.recording_of_this_thread(), functions_.recording_delete);
    return [this, recording] { functions_.recording_continue(recording.get()); };
  }

 private:
  class Step final : public Open {
   public:
    Step(sdio_step* step, const Functions& functions) : step_(step, functions.step_end) {}

   private:
    const Owned<sdio_step> step_;
  };

  const Functions& functions_;
};

void delete_memory(void* memory) { delete static_cast<ReadMemory*>(memory); }

py::object tuple_of(const int64_t* values, int64_t count) {
  py::object tuple = owned([&] { return PyTuple_New(static_cast<Py_ssize_t>(count)); });
  for (int64_t i = 0; i < count; ++i) {
    PyTuple_SET_ITEM(tuple.ptr(), static_cast<Py_ssize_t>(i), owned(PyLong_FromLongLong(values[i])).release().ptr());
  }
  return untracked(std::move(tuple));
}

class TorchThroughTable final : public Torch {
 public:
  explicit TorchThroughTable(const Functions& functions) : functions_(functions) {}

  Storage storage_of(py::handle untyped_storage) const override {
    sdio_storage* const storage = functions_.storage_of(untyped_storage.ptr());
    if (storage == nullptr) throw py::error_already_set();
    Storage held(*this, storage, /*on_host=*/true);
    if (facts(storage).on_host != 0) return held;
    return Storage(*this, functions_.storage_retain(storage), /*on_host=*/false);
  }

  py::object storage_over(char* data, uint64_t nbytes, std::unique_ptr<ReadMemory> memory) const override {
    return owned(functions_.storage_over(data, nbytes, &delete_memory, memory.release()));
  }

  bool is_plain(PyObject* tensor) const override {
    sdio_plain_tensor plain;
    return functions_.plain_tensor(tensor, &plain) != 0;
  }

  bool describe(PyObject* tensor, PlainTensor& described) const override {
    sdio_plain_tensor plain;
    if (functions_.plain_tensor(tensor, &plain) == 0) return false;
    const sdio_storage_facts found = facts(plain.storage);
    described.storage = Storage(*this, functions_.storage_retain(plain.storage), found.on_host != 0);
    described.storage_bytes = {found.data, found.nbytes};
    described.dtype = plain.dtype;
    described.itemsize = plain.itemsize;
    described.storage_offset = owned(PyLong_FromLongLong(plain.storage_offset));
    described.sizes = tuple_of(plain.sizes, plain.num_dimensions);
    described.strides = tuple_of(plain.strides, plain.num_dimensions);
    described.requires_grad = plain.requires_grad != 0;
    return true;
  }

  std::unique_ptr<FixedStorages> fix(const std::vector<Storage>& storages) const override {
    std::vector<sdio_storage*> held;
    held.reserve(storages.size());
    for (const Storage& storage : storages) held.push_back(storage_in(storage.held()));
    sdio_fixed* const fixed = functions_.fix(held.data(), held.size());
    if (fixed == nullptr) throw py::error_already_set();
    return std::make_unique<FixedThroughTable>(fixed, functions_);
  }

  void forget_fixed() const override { functions_.forget_fixed(); }

  std::unique_ptr<SlotMemory> pin() const override {
    char* data = nullptr;
    sdio_pinned* const pinned = functions_.pin(kSlotNbytes, &data);
    if (pinned == nullptr) return nullptr;
    return std::make_unique<PinnedThroughTable>(pinned, data, functions_);
  }

  std::unique_ptr<DeviceSource> source(const std::vector<DeviceBytes>& records) const override {
    const std::vector<sdio_device_bytes> bytes = borrowed(records);
    sdio_status status = SDIO_OK;
    sdio_error error{};
    sdio_source* const source = functions_.source_new(bytes.data(), bytes.size(), &status, &error);
    if (source == nullptr) raise(error);
    return std::make_unique<TableSource>(source, functions_);
  }

  std::unique_ptr<StorageDestination> destination(const std::string& device,
                                                  const std::vector<uint64_t>& sizes) const override {
    sdio_status status = SDIO_OK;
    sdio_error error{};
    sdio_destination* const destination =
        functions_.destination_new(device.c_str(), sizes.data(), sizes.size(), &status, &error);
    if (destination == nullptr) return nullptr;  // torch's own way copes, or says in its words why it cannot
    return std::make_unique<TableDestination>(destination, sizes.size(), functions_);
  }

  std::unique_ptr<DeviceClones> clones(const std::vector<DeviceBytes>& originals) const override {
    const std::vector<sdio_device_bytes> bytes = borrowed(originals);
    sdio_status status = SDIO_OK;
    sdio_error error{};
    sdio_clones* const clones = functions_.clones_new(bytes.data(), bytes.size(), &status, &error);
    if (clones == nullptr && status == SDIO_NO_MEMORY) return nullptr;
    if (clones == nullptr) raise(error);
    return std::make_unique<TableClones>(clones, originals.size(), functions_, *this);
  }

  void* retain(void* held) const override { return functions_.storage_retain(storage_in(held)); }
  void release(void* held) const override { functions_.storage_release(storage_in(held)); }
  const void* identity(void* held) const override { return held; }

  StorageBytes bytes(void* held) const override {
    const sdio_storage_facts found = facts(storage_in(held));
    return {found.data, found.nbytes};
  }

  std::string device(void* held) const override {
    char name[32];
    functions_.storage_device(storage_in(held), name, sizeof(name));
    return name;
  }
  py::object object(void* held) const override { return owned(functions_.storage_wrap(storage_in(held))); }

 private:
  sdio_storage_facts facts(const sdio_storage* storage) const {
    sdio_storage_facts found;
    if (functions_.storage_facts(storage, &found) != 0) throw py::error_already_set();
    return found;
  }

  const Functions& functions_;
};

}  // namespace

std::unique_ptr<const Torch> torch_through_table(const py::object& capsule) {
  const auto* const functions =
      static_cast<const Functions*>(PyCapsule_GetPointer(capsule.ptr(), SDIO_TORCH_FUNCTIONS_CAPSULE));
  if (functions == nullptr) throw py::error_already_set();
  if (functions->version != SDIO_TORCH_FUNCTIONS_VERSION) {
    throw std::invalid_argument("its table of functions is of version " + std::to_string(functions->version) +
                                ", statedict_io._core needs version " + std::to_string(SDIO_TORCH_FUNCTIONS_VERSION));
  }
  auto torch = std::make_unique<TorchThroughTable>(*functions);
  set_step_recorder(new TableSteps(*functions));
  return torch;
}

}  // namespace sdio
