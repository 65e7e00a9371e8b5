#include "core/pinned_slots.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "boundary/torch_functions.h"
#include "core/torch.h"
#include "pipeline/memory/process_slots.h"

namespace sdio {
namespace {

constexpr uintptr_t kPageNbytes = 4096;  // the alignment that direct I/O needs
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

}  // namespace

SlotPool& pinned_slots() { return ProcessSlots<PinnedAllocator>::regions(); }
SlotPool& pinned_snapshot_slots() { return ProcessSlots<PinnedAllocator>::snapshots(); }

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
