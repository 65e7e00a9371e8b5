// The process's pools of slots in memory that accelerators copy from and to at full speed; plain memory where none can
// be had. As SlotPool::host() and SlotPool::snapshots(): any thread, and a forked child starts with empty ones.
#pragma once

#include <optional>
#include <vector>

#include "pipeline/memory/slot_pool.h"
#include "pipeline/write/device_source.h"

namespace sdio {

SlotPool& pinned_slots();
SlotPool& pinned_snapshot_slots();

// A slot to gather the small ones of `pieces` through, where there are enough of them and memory is not short.
std::optional<SlotPool::Handle> slot_to_gather(const std::vector<DevicePiece>& pieces);

}  // namespace sdio
