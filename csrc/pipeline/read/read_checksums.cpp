// Reads payloads for their CRCs alone: every span passes through a slot.
#include <optional>
#include <utility>

#include "pipeline/memory/slot_pool.h"
#include "pipeline/read/parallel_read.h"

namespace sdio {
namespace {

class ReadChecksums final : public ParallelRead {
 public:
  ReadChecksums(const Directory& directory, PositionalSource& source, const std::vector<size_t>& records,
                const ReadOptions& options)
      : ParallelRead(directory, source, records, ReadPlan::Keep::kNothing, /*checksum=*/true, options,
                     threads_for_slots()) {}

 private:
  void work(WorkerThreads& workers) override {
    std::optional<SlotPool::Handle> slot;
    for_each_span(workers, [&](const PlannedSpan& span) {
      if (!slot) slot.emplace(SlotPool::host().acquire());
      read({span, slot->data()}, workers);
    });
  }
};

}  // namespace

std::vector<uint32_t> payload_checksums(const Directory& directory, PositionalSource& source,
                                        const std::vector<size_t>& records, const ReadOptions& options,
                                        const ReadWatcher& watch) {
  ReadChecksums read(directory, source, records, options);
  read.run(watch);
  return std::move(read.crcs());
}

}  // namespace sdio
