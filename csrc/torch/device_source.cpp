// Storages on accelerators that are copied into pinned slots, with LibTorch's device-generic streams, events and
// copies: no CUDA header, no CUDA library. The storages are held until source_delete().
#include <ATen/ops/cat.h>
#include <c10/core/Device.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "torch/functions.h"
#include "torch/raw_bytes.h"
#include "torch/side_stream.h"
#include "torch/statuses.h"

struct sdio_source {
  std::vector<sdio::DeviceBytes> records;
  std::unordered_map<c10::Device, c10::Stream> side_streams;
};

namespace sdio {
namespace {

using Pieces = std::vector<sdio_device_piece>;

bool is_small(const sdio_device_piece& piece) { return piece.nbytes < SDIO_GATHER_BELOW_NBYTES; }

class CopyFromDevice {
 public:
  CopyFromDevice(const sdio_source& source, c10::Device device, char* bounce)
      : source_(source), side_(source.side_streams.at(device)), bounce_(bounce) {}

  void run(const Pieces& pieces) {
    const c10::StreamGuard on_side_stream(side_);
    std::vector<at::Tensor> small;
    at::Tensor gathered;  // both must live until the copy between them has finished
    LandsOnFailure copies(side_);
    for (const sdio_device_piece& piece : pieces) {
      if (bounce_ != nullptr && is_small(piece)) {
        small.push_back(bytes_of(piece));
      } else {
        copy(piece, bytes_of(piece));
      }
    }
    if (!small.empty()) gathered = gather(small);
    if (gathered.defined()) {
      host_bytes(bounce_, static_cast<uint64_t>(gathered.numel())).copy_(gathered, /*non_blocking=*/true);
    } else {
      auto next = small.begin();
      for (const sdio_device_piece& piece : pieces) {
        if (next != small.end() && is_small(piece)) copy(piece, *next++);
      }
    }
    c10::Event landed(side_.device_type());
    landed.record(side_);
    landed.synchronize();
    copies.landed();
    if (gathered.defined()) distribute(pieces);
  }

 private:
  at::Tensor bytes_of(const sdio_device_piece& piece) const {
    const DeviceBytes& record = source_.records[piece.record];
    return device_bytes(record.storage, record.offset + piece.record_offset, piece.nbytes);
  }

  static void copy(const sdio_device_piece& piece, const at::Tensor& source) {
    host_bytes(piece.destination, piece.nbytes).copy_(source, /*non_blocking=*/true);
  }

  // Undefined where the device has no room; then there is a copy for each piece.
  static at::Tensor gather(const std::vector<at::Tensor>& small) {
    try {
      return at::cat(small);
    } catch (const c10::OutOfMemoryError&) {
      return {};
    }
  }

  void distribute(const Pieces& pieces) const {
    const char* next = bounce_;
    for (const sdio_device_piece& piece : pieces) {
      if (!is_small(piece)) continue;
      std::memcpy(piece.destination, next, piece.nbytes);
      next += piece.nbytes;
    }
  }

  const sdio_source& source_;
  const c10::Stream side_;
  char* const bounce_;
};

void copy_all(const sdio_source& source, const Pieces& pieces, char* bounce) {
  const PlainDispatch plain;
  for (const auto& [device, stream] : source.side_streams) {
    if (source.side_streams.size() == 1) {
      CopyFromDevice(source, device, bounce).run(pieces);
      continue;
    }
    Pieces of_device;
    for (const sdio_device_piece& piece : pieces) {
      if (source.records[piece.record].storage.device() == device) of_device.push_back(piece);
    }
    if (!of_device.empty()) CopyFromDevice(source, device, bounce).run(of_device);
  }
}

}  // namespace

sdio_source* source_new(const sdio_device_bytes* records, size_t num_records, sdio_status* status,
                        sdio_error* error) noexcept {
  return made(status, error, [&] {
    auto source = std::make_unique<sdio_source>();
    source->records = shared(records, num_records);
    for (const DeviceBytes& bytes : source->records) {
      if (!bytes.storage || source->side_streams.count(bytes.storage.device()) != 0) continue;
      source->side_streams.emplace(bytes.storage.device(), side_stream_after_current(bytes.storage.device()));
    }
    return source;
  });
}

sdio_status source_copy(sdio_source* source, const sdio_device_piece* pieces, size_t num_pieces, char* bounce,
                        sdio_error* error) noexcept {
  return status_of(error, [&] { copy_all(*source, {pieces, pieces + num_pieces}, bounce); });
}

void source_delete(sdio_source* source) noexcept { delete source; }

}  // namespace sdio
