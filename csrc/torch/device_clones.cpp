// Copies of storages in the memory of the devices they are on: the snapshot of an asynchronous save that is over as
// soon as the device gets to it.
#include <ATen/ops/cat.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "torch/functions.h"
#include "torch/raw_bytes.h"
#include "torch/statuses.h"

struct sdio_clones {
  std::vector<sdio::DeviceBytes> records;
  std::vector<c10::Event> copied;  // one a device
};

namespace sdio {
namespace {

// So many bytes of small pieces are gathered at a time: a copy costs some microseconds, whatever its size.
constexpr uint64_t kGatherNbytes = 64u << 20;

class Gather {
 public:
  explicit Gather(std::vector<DeviceBytes>& clones) : clones_(clones) {}

  void add(size_t record, at::Tensor bytes) {
    nbytes_ += static_cast<uint64_t>(bytes.numel());
    records_.push_back(record);
    small_.push_back(std::move(bytes));
    if (nbytes_ >= kGatherNbytes) finish();
  }

  void finish() {
    if (small_.empty()) return;
    const at::Tensor gathered = at::cat(small_);
    uint64_t offset = 0;
    for (size_t i = 0; i < small_.size(); ++i) {
      const auto nbytes = static_cast<uint64_t>(small_[i].numel());
      clones_[records_[i]] = {gathered.storage(), offset, nbytes};
      offset += nbytes;
    }
    small_.clear();
    records_.clear();
    nbytes_ = 0;
  }

 private:
  std::vector<DeviceBytes>& clones_;
  std::vector<at::Tensor> small_;
  std::vector<size_t> records_;
  uint64_t nbytes_ = 0;
};

std::unique_ptr<sdio_clones> clones_in_progress(const std::vector<DeviceBytes>& originals) {
  const PlainDispatch plain;
  auto made = std::make_unique<sdio_clones>();
  std::vector<DeviceBytes>& clones = made->records;
  clones.resize(originals.size());
  std::unordered_map<c10::Device, Gather> gathers;
  for (size_t record = 0; record < originals.size(); ++record) {
    const DeviceBytes& original = originals[record];
    if (!original.storage) continue;
    const c10::Device device = original.storage.device();
    Gather& gather = gathers.try_emplace(device, clones).first->second;
    if (original.nbytes == 0) continue;
    at::Tensor bytes = device_bytes(original.storage, original.offset, original.nbytes);
    if (original.nbytes < SDIO_GATHER_BELOW_NBYTES) {
      gather.add(record, std::move(bytes));
    } else {
      at::Tensor clone = at::empty(bytes.sizes(), at::TensorOptions().dtype(at::kByte).device(device));
      clone.copy_(bytes, /*non_blocking=*/true);
      clones[record] = {clone.storage(), 0, original.nbytes};
    }
  }
  for (auto& [device, gather] : gathers) {
    gather.finish();
    made->copied.emplace_back(device.type());
    made->copied.back().record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  }
  return made;
}

}  // namespace

sdio_clones* clones_new(const sdio_device_bytes* originals, size_t num_originals, sdio_status* status,
                        sdio_error* error) noexcept {
  return made(status, error, [&] { return clones_in_progress(shared(originals, num_originals)); });
}

sdio_device_bytes clones_of(const sdio_clones* clones, size_t record) noexcept {
  const DeviceBytes& bytes = clones->records[record];
  if (!bytes.storage) return {nullptr, 0, 0};
  return {handle_of(bytes.storage), bytes.offset, bytes.nbytes};
}

int clones_done(const sdio_clones* clones) noexcept {
  try {
    for (const c10::Event& event : clones->copied) {
      if (!event.query()) return 0;
    }
  } catch (...) {  // clones_wait() will report it
  }
  return 1;
}

sdio_status clones_wait(const sdio_clones* clones, sdio_error* error) noexcept {
  return status_of(error, [&] {
    for (const c10::Event& event : clones->copied) event.synchronize();
  });
}

void clones_delete(sdio_clones* clones) noexcept { delete clones; }

}  // namespace sdio
