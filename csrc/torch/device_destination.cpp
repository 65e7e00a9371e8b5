// Storages on an accelerator that are filled through pinned slots, with LibTorch's device-generic streams, events and
// copies: no CUDA header, no CUDA library. The storages are the caller's to use on any stream once all copies have been
// waited for.
#include <c10/core/Device.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <memory>
#include <vector>

#include "torch/functions.h"
#include "torch/raw_bytes.h"
#include "torch/side_stream.h"
#include "torch/statuses.h"

struct sdio_destination {
  std::vector<c10::Storage> storages;
  c10::Stream side_stream;
};

struct sdio_copies {
  explicit sdio_copies(const c10::Stream& stream) : landed(stream.device_type()), lands(stream) {}
  c10::Event landed;
  sdio::LandsOnFailure lands;
};

namespace sdio {
namespace {

c10::Device device_named(const char* name) {
  const c10::Device device{std::string(name)};
  return device.has_index() ? device : c10::impl::VirtualGuardImpl(device.type()).getDevice();
}

std::vector<c10::Storage> storages_on(c10::Device device, const uint64_t* sizes, size_t num_sizes) {
  const PlainDispatch plain;
  std::vector<c10::Storage> storages;
  storages.reserve(num_sizes);
  const auto bytes = at::TensorOptions().dtype(at::kByte).device(device);
  for (size_t i = 0; i < num_sizes; ++i) {
    storages.push_back(at::empty({static_cast<int64_t>(sizes[i])}, bytes).storage());
  }
  return storages;
}

std::unique_ptr<sdio_copies> copies_in_progress(const sdio_destination& destination, const sdio_arrived_piece* pieces,
                                                size_t num_pieces) {
  const PlainDispatch plain;
  const c10::StreamGuard on_side_stream(destination.side_stream);
  auto copies = std::make_unique<sdio_copies>(destination.side_stream);
  for (size_t i = 0; i < num_pieces; ++i) {
    const sdio_arrived_piece& piece = pieces[i];
    const at::Tensor source = host_bytes(const_cast<char*>(piece.source), piece.nbytes);
    device_bytes(destination.storages[piece.request], piece.payload_offset, piece.nbytes)
        .copy_(source, /*non_blocking=*/true);
  }
  copies->landed.record(destination.side_stream);
  return copies;
}

}  // namespace

// The storages first: what the allocator queues for them comes before the copies too.
sdio_destination* destination_new(const char* device_name, const uint64_t* sizes, size_t num_sizes, sdio_status* status,
                                  sdio_error* error) noexcept {
  return made(status, error, [&] {
    return supported([&] {
      const c10::Device device = device_named(device_name);
      std::vector<c10::Storage> storages = storages_on(device, sizes, num_sizes);
      return std::unique_ptr<sdio_destination>(
          new sdio_destination{std::move(storages), side_stream_after_current(device)});
    });
  });
}

sdio_copies* destination_copy(sdio_destination* destination, const sdio_arrived_piece* pieces, size_t num_pieces,
                              sdio_status* status, sdio_error* error) noexcept {
  return made(status, error, [&] { return copies_in_progress(*destination, pieces, num_pieces); });
}

sdio_status copies_wait(sdio_copies* copies, sdio_error* error) noexcept {
  return status_of(error, [&] {
    copies->landed.synchronize();
    copies->lands.landed();
  });
}

void copies_delete(sdio_copies* copies) noexcept { delete copies; }

const sdio_storage* destination_storage_handle(const sdio_destination* destination, size_t request) noexcept {
  return handle_of(destination->storages[request]);
}

void destination_delete(sdio_destination* destination) noexcept { delete destination; }

}  // namespace sdio
