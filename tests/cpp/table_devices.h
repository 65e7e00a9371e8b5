// Devices behind the functions of a _torch module, as the pipeline sees them.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "boundary/torch_functions.h"
#include "pipeline/memory/slot_pool.h"
#include "pipeline/read/device_destination.h"
#include "pipeline/write/device_source.h"

namespace sdio {

class DeviceError final : public std::runtime_error {
 public:
  DeviceError(sdio_status refused, const sdio_error& error) : std::runtime_error(error.message), status(refused) {}
  const sdio_status status;
};

class TableDevices {
 public:
  explicit TableDevices(const sdio_torch_functions& functions)
      : functions(functions), pinned(std::make_unique<Pinning>(functions), 16) {}

  const sdio_torch_functions functions;
  SlotPool pinned;

 private:
  class PinnedMemory final : public SlotMemory {
   public:
    PinnedMemory(const sdio_torch_functions& functions, sdio_pinned* pinned, char* data)
        : functions_(functions), pinned_(pinned) {
      data_ = data;
    }
    ~PinnedMemory() override { functions_.unpin(pinned_); }

   private:
    const sdio_torch_functions& functions_;
    sdio_pinned* const pinned_;
  };

  class Pinning final : public SlotAllocator {
   public:
    explicit Pinning(const sdio_torch_functions& functions) : functions_(functions) {}
    std::unique_ptr<SlotMemory> allocate() override {
      char* data = nullptr;
      sdio_pinned* const pinned = functions_.pin(kSlotNbytes, &data);
      if (pinned == nullptr) return HugePageAllocator().allocate();
      return std::make_unique<PinnedMemory>(functions_, pinned, data);
    }

   private:
    const sdio_torch_functions functions_;
  };
};

class TableSource final : public DeviceSource {
 public:
  TableSource(TableDevices& devices, const std::vector<sdio_device_bytes>& records) : devices_(devices) {
    sdio_status status = SDIO_OK;
    sdio_error error = {};
    source_ = devices_.functions.source_new(records.data(), records.size(), &status, &error);
    if (source_ == nullptr) throw DeviceError(status, error);
  }
  ~TableSource() override { devices_.functions.source_delete(source_); }
  TableSource(const TableSource&) = delete;
  TableSource& operator=(const TableSource&) = delete;

  void copy(const std::vector<DevicePiece>& pieces) override {
    std::vector<sdio_device_piece> plain;
    plain.reserve(pieces.size());
    for (const DevicePiece& piece : pieces) {
      plain.push_back({piece.record, piece.record_offset, piece.nbytes, piece.destination});
    }
    const SlotPool::Handle bounce = devices_.pinned.acquire();
    sdio_error error = {};
    const sdio_status status =
        devices_.functions.source_copy(source_, plain.data(), plain.size(), bounce.data(), &error);
    if (status != SDIO_OK) throw DeviceError(status, error);
  }
  SlotPool& slots() override { return devices_.pinned; }

 private:
  TableDevices& devices_;
  sdio_source* source_;
};

class TableDestination final : public DeviceDestination {
 public:
  TableDestination(TableDevices& devices, const std::string& device, const std::vector<uint64_t>& sizes)
      : devices_(devices) {
    sdio_status status = SDIO_OK;
    sdio_error error = {};
    destination_ = devices_.functions.destination_new(device.c_str(), sizes.data(), sizes.size(), &status, &error);
    if (destination_ == nullptr) throw DeviceError(status, error);
  }
  ~TableDestination() override { devices_.functions.destination_delete(destination_); }
  TableDestination(const TableDestination&) = delete;
  TableDestination& operator=(const TableDestination&) = delete;

  std::unique_ptr<QueuedCopies> copy(const std::vector<ArrivedPiece>& pieces) override {
    std::vector<sdio_arrived_piece> plain;
    plain.reserve(pieces.size());
    for (const ArrivedPiece& piece : pieces) {
      plain.push_back({piece.request, piece.payload_offset, piece.nbytes, piece.source});
    }
    sdio_status status = SDIO_OK;
    sdio_error error = {};
    sdio_copies* const copies =
        devices_.functions.destination_copy(destination_, plain.data(), plain.size(), &status, &error);
    if (copies == nullptr) throw DeviceError(status, error);
    return std::make_unique<Copies>(devices_.functions, copies);
  }
  SlotPool& slots() override { return devices_.pinned; }

  const sdio_destination* handle() const { return destination_; }

 private:
  class Copies final : public QueuedCopies {
   public:
    Copies(const sdio_torch_functions& functions, sdio_copies* copies) : functions_(functions), copies_(copies) {}
    ~Copies() override { functions_.copies_delete(copies_); }
    void wait() override {
      sdio_error error = {};
      const sdio_status status = functions_.copies_wait(copies_, &error);
      if (status != SDIO_OK) throw DeviceError(status, error);
    }

   private:
    const sdio_torch_functions& functions_;
    sdio_copies* const copies_;
  };

  TableDevices& devices_;
  sdio_destination* destination_;
};

}  // namespace sdio
