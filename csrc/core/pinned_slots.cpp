#include "core/pinned_slots.h"

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include "boundary/torch_functions.h"
#include "core/torch.h"

namespace sdio {
namespace {

constexpr size_t kMaxIdleSlots = 16;
constexpr uintptr_t kPageNbytes = 4096;  // as direct I/O asks for
// One copy command costs some microseconds whatever its size: smaller pieces are gathered on the device first.
constexpr auto kGatherAtLeast = 8;

class PinnedAllocator final : public SlotAllocator {
 public:
  std::unique_ptr<SlotMemory> allocate() override {
    std::unique_ptr<SlotMemory> pinned = torch().pin();
    if (pinned != nullptr && reinterpret_cast<uintptr_t>(pinned->data()) % kPageNbytes == 0) return pinned;
    return HugePageAllocator().allocate();
  }
};

// Never destroyed: pinned memory must not be freed after the driver has shut down.
SlotPool* pool = nullptr;
SlotPool* snapshot_pool = nullptr;

void start_pools() {
  pool = new SlotPool(std::make_unique<PinnedAllocator>(), kMaxIdleSlots);
  snapshot_pool = new SlotPool(std::make_unique<PinnedAllocator>(), std::numeric_limits<size_t>::max());
}

void start_pools_once() {
  static const bool started = [] {
    start_pools();
    pthread_atfork(nullptr, nullptr, start_pools);  // as SlotPool::host(): a lock may be held at fork()
    return true;
  }();
  static_cast<void>(started);
}

}  // namespace

SlotPool& pinned_slots() {
  start_pools_once();
  return *pool;
}

SlotPool& pinned_snapshot_slots() {
  start_pools_once();
  return *snapshot_pool;
}

std::optional<SlotPool::Handle> slot_to_gather(const std::vector<DevicePiece>& pieces) {
  const auto is_small = [](const DevicePiece& piece) { return piece.nbytes < SDIO_GATHER_BELOW_NBYTES; };
  if (std::count_if(pieces.begin(), pieces.end(), is_small) < kGatherAtLeast) return std::nullopt;
  try {
    return pinned_slots().acquire();
  } catch (const std::bad_alloc&) {  // a copy each, then
    return std::nullopt;
  }
}

}  // namespace sdio
