#include "pipeline/write/payload_copies.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>

#include "pipeline/threads/profiled_step.h"

namespace sdio {
namespace {

std::vector<uint64_t> starts_of(const std::vector<HostBytes>& sources) {
  std::vector<uint64_t> starts = {0};
  starts.reserve(sources.size() + 1);
  for (const HostBytes& source : sources) starts.push_back(starts.back() + source.nbytes);
  return starts;
}

uint64_t num_slots(uint64_t nbytes) { return (nbytes + kSlotNbytes - 1) / kSlotNbytes; }

class Copy final : public RegionWorker {
 public:
  Copy(const std::vector<HostBytes>& sources, const std::vector<uint64_t>& starts,
       const std::vector<SlotPool::Handle>& slots)
      : sources_(sources), starts_(starts), slots_(slots) {}

  void work(uint64_t begin, uint64_t nbytes) override {
    const ProfiledStep step("statedict_io::copy");
    size_t index = static_cast<size_t>(std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin()) - 1;
    char* const slot = slots_[begin / kSlotNbytes].data();
    for (uint64_t at = begin; at < begin + nbytes; ++index) {
      const uint64_t end = std::min(begin + nbytes, starts_[index + 1]);
      std::memcpy(slot + (at - begin), sources_[index].data + (at - starts_[index]), end - at);
      at = end;
    }
  }

 private:
  const std::vector<HostBytes>& sources_;
  const std::vector<uint64_t>& starts_;
  const std::vector<SlotPool::Handle>& slots_;
};

}  // namespace

PayloadCopies::PayloadCopies(const std::vector<HostBytes>& sources, SlotPool& slots, const Watcher& watch)
    : starts_(starts_of(sources)) {
  const Regions regions{starts_.back(), kSlotNbytes};
  if (regions.nbytes == 0) return;
  slots_.reserve(regions.count());
  while (slots_.size() < regions.count()) slots_.push_back(slots.acquire());
  for_each_region(
      regions, std::max(1u, std::thread::hardware_concurrency()),
      [&] { return std::make_unique<Copy>(sources, starts_, slots_); }, [] {}, watch);
}

uint64_t PayloadCopies::nbytes_of(const std::vector<HostBytes>& sources) {
  return num_slots(starts_of(sources).back()) * kSlotNbytes;
}

iovec PayloadCopies::bytes(size_t index, uint64_t offset, uint64_t nbytes) const {
  const uint64_t at = starts_[index] + offset;
  const uint64_t in_slot = at % kSlotNbytes;
  return {slots_[at / kSlotNbytes].data() + in_slot, std::min(nbytes, kSlotNbytes - in_slot)};
}

}  // namespace sdio
