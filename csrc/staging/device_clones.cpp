#include "staging/device_clones.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <unordered_map>
#include <utility>

#include "staging/raw_bytes.h"

namespace sdio {
namespace {

// One copy costs some microseconds whatever its size: smaller ones are gathered, so many bytes at a time.
constexpr uint64_t kGatherBelowNbytes = 128u << 10;
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

}  // namespace

std::optional<DeviceClones> DeviceClones::queue(const std::vector<DeviceBytes>& originals) {
  try {
    return DeviceClones(originals);
  } catch (const c10::OutOfMemoryError&) {  // fragmentation, or another process was faster
    return std::nullopt;
  }
}

DeviceClones::DeviceClones(const std::vector<DeviceBytes>& originals) : clones_(originals.size()) {
  const PlainDispatch plain;
  std::unordered_map<c10::Device, Gather> gathers;
  for (size_t record = 0; record < originals.size(); ++record) {
    const DeviceBytes& original = originals[record];
    if (!original.storage) continue;
    const c10::Device device = original.storage.device();
    Gather& gather = gathers.try_emplace(device, clones_).first->second;
    if (original.nbytes == 0) continue;
    at::Tensor bytes = device_bytes(original.storage, original.offset, original.nbytes);
    if (original.nbytes < kGatherBelowNbytes) {
      gather.add(record, std::move(bytes));
    } else {
      at::Tensor clone = at::empty(bytes.sizes(), at::TensorOptions().dtype(at::kByte).device(device));
      clone.copy_(bytes, /*non_blocking=*/true);
      clones_[record] = {clone.storage(), 0, original.nbytes};
    }
  }
  for (auto& [device, gather] : gathers) {
    gather.finish();
    copied_.emplace_back(device.type());
    copied_.back().record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  }
}

bool DeviceClones::done() const {
  for (const c10::Event& event : copied_) {
    if (!event.query()) return false;
  }
  return true;
}

void DeviceClones::wait() const {
  for (const c10::Event& event : copied_) event.synchronize();
}

}  // namespace sdio
