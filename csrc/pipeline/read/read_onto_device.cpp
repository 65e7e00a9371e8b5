// Reads payloads onto a device: each worker reads spans into two slots in turn, and has the parts of payloads in one
// copied while it reads into the other.
#include <algorithm>
#include <array>
#include <memory>
#include <optional>

#include "pipeline/memory/slot_pool.h"
#include "pipeline/read/parallel_read.h"
#include "pipeline/threads/profiled_step.h"

namespace sdio {
namespace {

class ReadOntoDevice final : public ParallelRead {
 public:
  ReadOntoDevice(const Directory& directory, PositionalSource& source, const std::vector<size_t>& records,
                 DeviceDestination& device, bool checksum, const ReadOptions& options)
      : ParallelRead(directory, source, records, ReadPlan::Keep::kNothing, checksum, options, threads_for_slots()),
        device_(device) {}

 private:
  struct Place {
    std::optional<SlotPool::Handle> slot;
    std::unique_ptr<QueuedCopies> copies;  // destroyed, and so waited for, before the slot
  };

  void work(WorkerThreads& workers) override {
    std::array<Place, 2> ring;
    size_t turn = 0;
    for_each_span(workers, [&](const PlannedSpan& span) {
      Place& place = ring[turn++ % ring.size()];
      wait_for_copies(place);
      if (!place.slot) place.slot.emplace(device_.slots().acquire());
      const SpanMemory bytes{span, place.slot->data()};
      read(bytes, workers);
      if (!workers.go_on()) return;
      const std::vector<ArrivedPiece> pieces = pieces_in(bytes);
      if (!pieces.empty()) place.copies = device_.copy(pieces);
    });
    for (Place& place : ring) wait_for_copies(place);
  }

  static void wait_for_copies(Place& place) {
    if (!place.copies) return;
    const ProfiledStep step("statedict_io::host_to_device");
    place.copies->wait();
    place.copies.reset();
  }

  // The parts of payloads that lie in a span that has been read.
  std::vector<ArrivedPiece> pieces_in(const SpanMemory& bytes) const {
    const PlannedSpan& span = bytes.span;
    std::vector<ArrivedPiece> pieces;
    for (size_t i = span.first_record; i < span.end_record; ++i) {
      const PlannedRecord& planned = plan_.records[i];
      const uint64_t payload = payload_begin(i);
      const uint64_t from = std::max(span.begin, payload);
      const uint64_t to = std::min(span.end, payload + planned.nbytes);
      if (from < to) pieces.push_back({planned.request, from - payload, to - from, bytes.at(from)});
    }
    return pieces;
  }

  DeviceDestination& device_;
};

}  // namespace

std::vector<size_t> load_payloads_onto(const Directory& directory, PositionalSource& source,
                                       const std::vector<size_t>& records, DeviceDestination& device, bool verify,
                                       const ReadOptions& options, const ReadWatcher& watch) {
  ReadOntoDevice read(directory, source, records, device, verify, options);
  read.run(watch);
  return read.with_wrong_crc();
}

}  // namespace sdio
