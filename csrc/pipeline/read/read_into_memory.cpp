// Reads payloads into memory that outlives the read. Large ones stay where they were read to, in the mirror of their
// extent; small ones are copied out of it, or out of a slot.
#include <algorithm>
#include <cstring>
#include <optional>

#include "checksum/crc32.h"
#include "pipeline/memory/slot_pool.h"
#include "pipeline/read/parallel_read.h"
#include "pipeline/threads/profiled_step.h"

namespace sdio {
namespace {

// Direct reads that were queued together end together: what a worker does between two of them, faulting memory in or
// checksumming, others must cover.
constexpr size_t kNumThreads = 8;
// What malloc gives, and what vector loads of torch's kernels need.
constexpr uintptr_t kPayloadAlignment = 16;
// Unused pages between payloads are kept where giving them back would save less than this share: it splits huge pages.
constexpr uint64_t kKeptGapShare = 64;

class ReadIntoMemory final : public ParallelRead {
 public:
  ReadIntoMemory(const Directory& directory, PositionalSource& source, const std::vector<size_t>& records,
                 PayloadMemory& memory, bool checksum, const ReadOptions& options)
      : ParallelRead(directory, source, records, ReadPlan::Keep::kMemory, checksum, options, kNumThreads),
        memory_(memory),
        extents_(plan_.extents.size()),
        adopted_(records.size()) {
    const uint64_t alignment = plan_alignment(source);
    for (size_t i = 0; i < extents_.size(); ++i) {
      const PlannedExtent& extent = plan_.extents[i];
      if (!extent.mirrored) continue;
      // Room for a direct read to the end of its last block.
      const uint64_t nbytes = (extent.end - extent.begin + alignment - 1) / alignment * alignment;
      extents_[i] = memory_.map_extent(extent.begin, nbytes);
    }
  }

 private:
  void work(WorkerThreads& workers) override {
    if (num_threads_ != 0 && !faulting_in_.exchange(true)) fault_in_ahead(workers);
    std::optional<SlotPool::Handle> slot;
    for_each_span(workers, [&](const PlannedSpan& span) {
      const std::shared_ptr<ExtentMemory>& extent = extents_[span.extent];
      if (!extent && !slot) slot.emplace(SlotPool::host().acquire());
      read({span, extent ? extent->at(span.begin) : slot->data()}, workers);
    });
  }

  // While a direct read clears the memory that it goes to, the disk has less to do: one thread clears it ahead of the
  // others. Reads from the page cache keep the cores busy themselves.
  void fault_in_ahead(WorkerThreads& workers) {
    for (size_t i = 0; i < plan_.spans.size() && workers.go_on(); i = std::max<size_t>(i + 1, next_span_)) {
      const PlannedSpan& span = plan_.spans[i];
      const std::shared_ptr<ExtentMemory>& extent = extents_[span.extent];
      if (!extent || !source_.prefers_direct(span.begin, span.end - span.begin)) continue;
      const ProfiledStep step("statedict_io::fault_in");
      if (!extent->fault_in(span.begin, span.end)) return;
    }
  }

  void finish(size_t index, const SpanMemory& last) override {
    const PlannedRecord& planned = plan_.records[index];
    char* const payload = last.at(payload_begin(index));
    if (!planned.is_large()) {
      copy(planned, payload);
      return;
    }
    if (!planned.has_header && reinterpret_cast<uintptr_t>(payload) % directory_[planned.record].alignment != 0) {
      copy(planned, payload);  // its neighbours leave no room to move it
      return;
    }
    ParallelRead::finish(index, last);
    adopted_[index] = planned.has_header ? aligned(payload, planned.nbytes) : payload;
    memory_.adopt(planned.request, adopted_[index], planned.nbytes, extents_[last.span.extent]);
  }

  void copy(const PlannedRecord& planned, const char* payload) {
    char* const destination = memory_.allocate(planned.request, planned.nbytes);
    if (planned.nbytes == 0) return;
    if (checksum_) {
      crcs_[planned.request] = crc32_copy(0, destination, payload, planned.nbytes);
    } else {
      std::memcpy(destination, payload, planned.nbytes);
    }
  }

  // Where the payload is. Writers other than torch do not align it; then it is moved down over its own header.
  static char* aligned(char* payload, uint64_t nbytes) {
    const uintptr_t misalignment = reinterpret_cast<uintptr_t>(payload) % kPayloadAlignment;
    char* const begin = payload - misalignment;
    if (misalignment != 0) std::memmove(begin, payload, nbytes);
    return begin;
  }

  void all_read() override {
    for (const std::shared_ptr<ExtentMemory>& extent : extents_) {
      if (extent) extent->allow_fork();
    }
    size_t next = 0;
    for (size_t i = 0; i < extents_.size(); ++i) {
      const size_t first = next;
      while (next < plan_.records.size() && plan_.records[next].end <= plan_.extents[i].end) ++next;
      if (extents_[i]) release_gaps(i, first, next);
    }
  }

  // Gives back to the system what lies between the payloads [first, last) that stay in an extent.
  void release_gaps(size_t extent, size_t first, size_t last) {
    char* gap = extents_[extent]->at(plan_.extents[extent].begin);
    for (size_t i = first; i < last; ++i) {
      if (adopted_[i] == nullptr) continue;
      const auto gap_nbytes = static_cast<uint64_t>(adopted_[i] - gap);
      if (gap_nbytes >= plan_.records[i].nbytes / kKeptGapShare) ExtentMemory::release(gap, gap_nbytes);
      gap = adopted_[i] + plan_.records[i].nbytes;
    }
    char* const end = extents_[extent]->at(plan_.extents[extent].end);
    ExtentMemory::release(gap, static_cast<uint64_t>(end - gap));
  }

  PayloadMemory& memory_;
  std::vector<std::shared_ptr<ExtentMemory>> extents_;  // null where the extent is not mirrored
  std::vector<char*> adopted_;                          // by index in the plan; null: the payload was copied
  std::atomic<bool> faulting_in_{false};
};

}  // namespace

std::vector<size_t> load_payloads(const Directory& directory, PositionalSource& source,
                                  const std::vector<size_t>& records, PayloadMemory& memory, bool verify,
                                  const ReadOptions& options, const ReadWatcher& watch) {
  ReadIntoMemory read(directory, source, records, memory, verify, options);
  read.run(watch);
  return read.with_wrong_crc();
}

}  // namespace sdio
