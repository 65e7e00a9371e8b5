// What _core needs of torch: storages, plain tensors, devices, and no header of torch's.
//
// Two implementations: torch_through_python.h asks through Python's C API, torch_through_table.h through the functions
// that a module _torch hands over. All of this needs the GIL, but for what says otherwise.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "pipeline/memory/slot_pool.h"
#include "pipeline/read/device_destination.h"
#include "pipeline/write/device_source.h"

namespace sdio {

class Torch;

struct StorageBytes {
  const char* data = nullptr;  // null where it has no bytes, and on the meta device
  uint64_t nbytes = 0;
};

// A torch.UntypedStorage, held.
class Storage {
 public:
  Storage() = default;                                   // no storage
  Storage(const Torch& torch, void* held, bool on_host)  // takes over `held`
      : torch_(&torch), held_(held), on_host_(on_host) {}
  Storage(const Storage& other);
  Storage(Storage&& other) noexcept
      : torch_(other.torch_), held_(std::exchange(other.held_, nullptr)), on_host_(other.on_host_) {}
  Storage& operator=(Storage other) noexcept {
    std::swap(torch_, other.torch_);
    std::swap(held_, other.held_);
    std::swap(on_host_, other.on_host_);
    return *this;
  }
  ~Storage();

  explicit operator bool() const { return held_ != nullptr; }
  bool on_host() const { return on_host_; }
  const Torch& torch() const { return *torch_; }
  void* held() const { return held_; }

  const void* identity() const;
  StorageBytes bytes() const;  // raises what torch's data_ptr() raises where bytes have no address
  std::string device() const;  // "cuda:0"
  pybind11::object object() const;

 private:
  const Torch* torch_ = nullptr;
  void* held_ = nullptr;
  bool on_host_ = false;
};

// What torch reduces to _rebuild_tensor_v2: strided, dense, no lazy conjugation or negation, no wrapper, no mode.
struct PlainTensor {
  Storage storage;
  StorageBytes storage_bytes;
  pybind11::handle dtype;
  int64_t itemsize = 0;
  pybind11::object storage_offset, sizes, strides;  // the latter two are tuples that the cyclic collector ignores
  bool requires_grad = false;
};

// Bytes of a storage on a device.
struct DeviceBytes {
  Storage storage;      // none: the record is not on a device
  uint64_t offset = 0;  // of the first byte in it
  uint64_t nbytes = 0;
};

// Storages on a device that are filled as the pipeline reads.
class StorageDestination : public DeviceDestination {
 public:
  virtual pybind11::list storages() const = 0;  // torch.UntypedStorage, one a request; once all copies have landed
};

// Copies of storages in the memory of the devices they are on.
class DeviceClones {
 public:
  virtual ~DeviceClones() = default;
  virtual const std::vector<DeviceBytes>& records() const = 0;  // one an original
  virtual bool done() const = 0;
  virtual void wait() const = 0;  // without the GIL
};

// The memory of storages stays where it is while this lives: resize_() raises.
class FixedStorages {
 public:
  virtual ~FixedStorages() = default;
};

// Memory whose owner may be destroyed in any thread.
class ReadMemory {
 public:
  virtual ~ReadMemory() = default;
};

class Torch {
 public:
  virtual ~Torch() = default;

  // TypeError for anything but a torch.UntypedStorage.
  virtual Storage storage_of(pybind11::handle untyped_storage) const = 0;
  // A CPU storage over [data, data + nbytes) of `memory`, not resizable.
  virtual pybind11::object storage_over(char* data, uint64_t nbytes, std::unique_ptr<ReadMemory> memory) const = 0;

  // `tensor` is exactly a torch.Tensor or a Parameter. describe() is false where it is not plain.
  virtual bool is_plain(PyObject* tensor) const = 0;
  virtual bool describe(PyObject* tensor, PlainTensor& described) const = 0;

  // Null where storages cannot be kept from being resized.
  virtual std::unique_ptr<FixedStorages> fix(const std::vector<Storage>& storages) const = 0;
  virtual void forget_fixed() const = 0;  // in a forked child: what threads of the parent have fixed

  // Page-aligned memory of kSlotNbytes that an accelerator copies from and to at full speed; null where there is none.
  // Any thread, with or without the GIL, as is the memory's destruction.
  virtual std::unique_ptr<SlotMemory> pin() const = 0;

  // In the thread whose current streams the copies are ordered after. Pieces are of records[record].
  virtual std::unique_ptr<DeviceSource> source(const std::vector<DeviceBytes>& records) const = 0;
  // Null where the device has no streams and events, or no room.
  virtual std::unique_ptr<StorageDestination> destination(const std::string& device,
                                                          const std::vector<uint64_t>& sizes) const = 0;
  // Null where a device has no room.
  virtual std::unique_ptr<DeviceClones> clones(const std::vector<DeviceBytes>& originals) const = 0;

  // The methods of Storage.
  virtual void* retain(void* held) const = 0;
  virtual void release(void* held) const = 0;
  virtual const void* identity(void* held) const = 0;
  virtual StorageBytes bytes(void* held) const = 0;
  virtual std::string device(void* held) const = 0;
  virtual pybind11::object object(void* held) const = 0;
};

// The implementation in use. Throws std::runtime_error before there is one.
const Torch& torch();
// Objects made under another one go on with that: it lives as long as the process.
void use(std::unique_ptr<const Torch> implementation);

inline Storage::Storage(const Storage& other)
    : torch_(other.torch_),
      held_(other.held_ != nullptr ? other.torch_->retain(other.held_) : nullptr),
      on_host_(other.on_host_) {}
inline Storage::~Storage() {
  if (held_ != nullptr) torch_->release(held_);
}
inline const void* Storage::identity() const { return torch_->identity(held_); }
inline StorageBytes Storage::bytes() const { return torch_->bytes(held_); }
inline std::string Storage::device() const { return torch_->device(held_); }
inline pybind11::object Storage::object() const { return torch_->object(held_); }

}  // namespace sdio
