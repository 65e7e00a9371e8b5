// The process's pools of slots in memory that accelerators copy from and to at full speed, or in plain memory where
// none can be pinned. Any thread may use them; see process_slots.h.
#pragma once

#include <optional>
#include <vector>

#include "pipeline/memory/slot_pool.h"
#include "pipeline/write/device_source.h"

namespace sdio {

SlotPool& pinned_slots();
SlotPool& pinned_snapshot_slots();

// A slot through which the small ones of `pieces` can be gathered; none where they are few or memory is short.
std::optional<SlotPool::Handle> slot_to_gather(const std::vector<DevicePiece>& pieces);

}  // namespace sdio
