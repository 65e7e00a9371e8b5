// Reads payloads onto a device: each worker reads spans into two slots in turn, and has the parts of payloads in one
// copied while it reads into the other.
#include <array>
#include <condition_variable>
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
        device_(device),
        heads_(std::make_unique<Head[]>(records.size())) {
    for (size_t i = 0; i < plan_.records.size(); ++i) {
      heads_[i].nbytes_left = plan_.records[i].sure_begin - plan_.records[i].begin;
    }
  }

 private:
  // What is known of the beginning of a record that crosses.
  struct Head {
    std::atomic<uint64_t> nbytes_left{0};
    std::atomic<uint64_t> payload_begin{0};  // in the file; 0 until all of the head has been read
  };

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
      const std::vector<ArrivedPiece> pieces = pieces_in(bytes, workers);
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

  // The parts of payloads that can be copied now that this span has been read. None where the read was cancelled.
  std::vector<ArrivedPiece> pieces_in(const SpanMemory& bytes, WorkerThreads& workers) {
    const PlannedSpan& span = bytes.span;
    std::vector<ArrivedPiece> pieces;
    for (size_t i = span.first_record; i < plan_.records.size() && plan_.records[i].begin < span.end; ++i) {
      const PlannedRecord& planned = plan_.records[i];
      if (planned.crosses && planned.sure_begin > span.end) continue;  // for the span in which its head ends
      const std::optional<uint64_t> payload = payload_begin(bytes, i, workers);
      if (!payload) return {};
      const uint64_t from = std::max(span.begin, *payload);
      const uint64_t to = std::min(span.end, *payload + planned.nbytes);
      if (from < to) pieces.push_back({planned.request, from - *payload, to - from, bytes.at(from)});
      if (*payload < span.begin && planned.sure_begin > span.begin) {  // its head ends here, and began in spans before
        const uint64_t before = std::min(span.begin - *payload, planned.nbytes);
        if (before != 0) pieces.push_back({planned.request, 0, before, kept(i, *payload)});
      }
    }
    return pieces;
  }

  // Where in the file the payload begins. Of a record that crosses, it may have to wait for the threads that read the
  // spans before: they took them earlier, and wait only when they have read them, so that this ends. None where the
  // read was cancelled.
  std::optional<uint64_t> payload_begin(const SpanMemory& bytes, size_t index, WorkerThreads& workers) {
    const PlannedRecord& planned = plan_.records[index];
    if (!planned.crosses) return directory_.payload_offset(planned.record, bytes.at(planned.begin));
    std::unique_lock<std::mutex> lock(mutex_);
    head_is_known_.wait(lock, [&] { return heads_[index].payload_begin != 0 || !workers.go_on(); });
    const uint64_t begin = heads_[index].payload_begin;
    return begin != 0 ? std::optional<uint64_t>(begin) : std::nullopt;
  }

  void kept_head(size_t index, uint64_t begin, uint64_t end) override {
    Head& head = heads_[index];
    if (head.nbytes_left.fetch_sub(end - begin, std::memory_order_acq_rel) != end - begin) return;
    const PlannedRecord& planned = plan_.records[index];
    head.payload_begin = directory_.payload_offset(planned.record, kept(index, planned.begin));
    wake_waiting();
  }

  void cancel() override { wake_waiting(); }

  void wake_waiting() {
    const std::lock_guard<std::mutex> lock(mutex_);
    head_is_known_.notify_all();
  }

  // A head that lies in two spans is copied from where it was kept, until the read ends.
  bool keeps_head(const PlannedRecord& planned) const override {
    return planned.begin / span_nbytes_ != (planned.sure_begin - 1) / span_nbytes_;
  }

  void finish(const ReadPayload& payload) override {
    if (checksum_) crcs_[payload.planned.request] = crc_of(payload);
  }

  DeviceDestination& device_;
  const std::unique_ptr<Head[]> heads_;  // of plan_.records
  std::mutex mutex_;
  std::condition_variable head_is_known_;
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
