#include "pipeline/write/host_snapshot.h"

#include <algorithm>
#include <memory>
#include <thread>

#include "pipeline/write/region_assembler.h"

namespace sdio {
namespace {

// More threads copy no faster: memory is the limit, and not the cores.
constexpr size_t kMaxCopyThreads = 16;

size_t num_copy_threads(const Records& records) {
  const size_t cores = std::max(1u, std::thread::hardware_concurrency());
  return records.devices != nullptr ? std::clamp<size_t>(cores, 4, 8) : std::min(cores, kMaxCopyThreads);
}

class Assemble final : public RegionWorker {
 public:
  Assemble(const Records& records, RegionAssembler& assembler, SlotPool& slots,
           std::vector<std::optional<SlotPool::Handle>>& regions)
      : records_(records), assembler_(assembler), slots_(slots), regions_(regions) {}

  void work(uint64_t begin, uint64_t nbytes) override {
    if (records_.is_hole(begin, nbytes)) return;
    std::optional<SlotPool::Handle>& slot = regions_[begin / kSlotNbytes];
    slot.emplace(slots_.acquire());
    pieces_.clear();
    assembler_.assemble(begin, nbytes, slot->memory(), RegionAssembler::Gather::kAll, pieces_);
  }

 private:
  const Records& records_;
  RegionAssembler& assembler_;
  SlotPool& slots_;
  std::vector<std::optional<SlotPool::Handle>>& regions_;
  std::vector<iovec> pieces_;
};

}  // namespace

HostSnapshot::HostSnapshot(const Records& records, SlotPool& slots, const Watcher& watch)
    : file_nbytes_(records.layout->file_nbytes()) {
  const Regions regions{file_nbytes_, kSlotNbytes};
  regions_.resize(regions.count());
  RegionAssembler assembler(records);
  for_each_region(
      regions, num_copy_threads(records),
      [&] { return std::make_unique<Assemble>(records, assembler, slots, regions_); }, [&] { assembler.cancel(); },
      watch);
}

uint64_t HostSnapshot::nbytes_of(const Records& records) {
  const uint64_t file_nbytes = records.layout->file_nbytes();
  uint64_t nbytes = 0;
  for (uint64_t begin = 0; begin < file_nbytes; begin += kSlotNbytes) {
    if (!records.is_hole(begin, std::min<uint64_t>(kSlotNbytes, file_nbytes - begin))) nbytes += kSlotNbytes;
  }
  return nbytes;
}

char* HostSnapshot::memory(uint64_t begin) {
  std::optional<SlotPool::Handle>& slot = regions_[begin / kSlotNbytes];
  return slot ? slot->data() : nullptr;
}

}  // namespace sdio
