#include "pipeline/read/payload_reader.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "checksum/crc32.h"
#include "pipeline/memory/slot_pool.h"
#include "pipeline/read/read_plan.h"
#include "pipeline/threads/profiled_step.h"
#include "pipeline/threads/worker_threads.h"

namespace sdio {
namespace {

// A buffered read of this size is still in the cache when it is checksummed or copied.
constexpr uint64_t kBlockNbytes = 1u << 20;
// Below this, starting threads costs more than it saves.
constexpr uint64_t kThreadsFromNbytes = 4u << 20;
// What malloc gives, and vector loads of torch's kernels get by with.
constexpr uintptr_t kPayloadAlignment = 16;
// Unused pages between payloads are kept where giving them back would save less than this share: it splits huge pages.
constexpr uint64_t kKeptGapShare = 64;

// Reads that were queued together end together: what a worker does between two of them, faulting memory in or
// checksumming, others must cover. Eight are 4 to 8 % faster than four into memory, up to 20 % where they checksum.
size_t default_num_threads(bool into_memory) {
  if (into_memory) return 8;
  return std::clamp<size_t>(std::thread::hardware_concurrency(), 4, 8);
}

uint64_t plan_alignment(const PositionalSource& source) {
  return std::max<uint64_t>(source.alignment(), static_cast<uint64_t>(sysconf(_SC_PAGESIZE)));
}

// What is known of a record so far, by whichever workers read parts of it.
struct RecordState {
  std::atomic<uint64_t> nbytes_left{0};       // of [begin, end)
  std::atomic<uint32_t> sure_crc{0};          // of the payload's sure part, from its pieces in any order
  std::unique_ptr<char[]> around_sure;        // of a record that crosses spans of slots: the rest of it
  char* adopted = nullptr;                    // where the payload stayed in its extent
  std::atomic<uint64_t> head_nbytes_left{0};  // of [begin, sure_begin), of a record that crosses spans of slots
  std::atomic<uint64_t> payload_begin{0};     // in the file; 0 until the head has been read
};

class ParallelRead {
 public:
  ParallelRead(const Directory& directory, PositionalSource& source, const std::vector<size_t>& records,
               PayloadMemory* memory, DeviceDestination* device, bool checksum, const ReadOptions& options)
      : directory_(directory),
        source_(source),
        span_nbytes_(options.span_nbytes != 0 ? options.span_nbytes : kSlotNbytes),
        plan_(directory, records, memory != nullptr ? ReadPlan::Keep::kMemory : ReadPlan::Keep::kNothing,
              plan_alignment(source), span_nbytes_),
        memory_(memory),
        device_(device),
        checksum_(checksum),
        num_threads_(num_threads(options, memory != nullptr)),
        states_(std::make_unique<RecordState[]>(records.size())) {
    for (size_t i = 0; i < plan_.records.size(); ++i) {
      states_[i].nbytes_left = plan_.records[i].end - plan_.records[i].begin;
      states_[i].head_nbytes_left = plan_.records[i].sure_begin - plan_.records[i].begin;
    }
    if (checksum_) crcs.resize(records.size());
  }

  void run(const ReadWatcher& watch) {
    extents_.resize(plan_.extents.size());
    const uint64_t alignment = plan_alignment(source_);
    for (size_t i = 0; i < extents_.size(); ++i) {
      const PlannedExtent& extent = plan_.extents[i];
      if (!extent.mirrored) continue;
      // Room for a direct read to the end of its last block.
      const uint64_t nbytes = (extent.end - extent.begin + alignment - 1) / alignment * alignment;
      extents_[i] = memory_->map_extent(extent.begin, nbytes);
    }
    WorkerThreads workers([this] { wake_waiting(); });
    workers.run(
        num_threads_, [&] { device_ != nullptr ? work_for_device(workers) : work(workers); },
        [&] { watch(bytes_done_, plan_.nbytes); });
    for (size_t i = 0; i < extents_.size(); ++i) {
      if (extents_[i]) extents_[i]->allow_fork();
    }
    release_gaps();
    watch(plan_.nbytes, plan_.nbytes);
  }

  std::vector<uint32_t> crcs;  // by request

 private:
  // A span in memory: of its extent, or of a slot.
  struct Bytes {
    const PlannedSpan& span;
    char* memory;
    const std::shared_ptr<ExtentMemory>& extent;  // null in a slot
  };

  // 0: the caller reads.
  size_t num_threads(const ReadOptions& options, bool into_memory) const {
    const size_t wanted = options.num_threads != 0 ? options.num_threads : default_num_threads(into_memory);
    const size_t useful = std::min(wanted, plan_.spans.size());
    return useful > 1 && plan_.nbytes >= kThreadsFromNbytes ? useful : 0;
  }

  void work(WorkerThreads& workers) {
    if (num_threads_ != 0 && !faulting_in_.exchange(true)) fault_in_ahead(workers);
    std::optional<SlotPool::Handle> slot;
    for (size_t i = next_span_++; i < plan_.spans.size() && workers.go_on(); i = next_span_++) {
      const PlannedSpan& span = plan_.spans[i];
      const std::shared_ptr<ExtentMemory>& extent = extents_[span.extent];
      if (!extent && !slot) slot.emplace(SlotPool::host().acquire());
      read(Bytes{span, extent ? extent->at(span.begin) : slot->data(), extent}, workers);
    }
  }

  // While a direct read clears the memory it goes to, the disk has less queued: a raw program's cold GiB takes 0.51 s
  // so, 0.45 into memory that another thread has cleared. Reads from the page cache keep the cores busy themselves.
  void fault_in_ahead(WorkerThreads& workers) {
    for (size_t i = 0; i < plan_.spans.size() && workers.go_on(); i = std::max<size_t>(i + 1, next_span_)) {
      const PlannedSpan& span = plan_.spans[i];
      const std::shared_ptr<ExtentMemory>& extent = extents_[span.extent];
      if (!extent || !source_.prefers_direct(span.begin, span.end - span.begin)) continue;
      const ProfiledStep step("statedict_io::fault_in");
      if (!extent->fault_in(span.begin, span.end)) return;
    }
  }

  // Two slots in turn: while one is copied from, the other is read into.
  void work_for_device(WorkerThreads& workers) {
    struct Place {
      std::optional<SlotPool::Handle> slot;
      std::unique_ptr<QueuedCopies> copies;  // gone, and that is waited for, before the slot is
    };
    std::array<Place, 2> ring;
    const std::shared_ptr<ExtentMemory> no_extent;
    size_t turn = 0;
    for (size_t i = next_span_++; i < plan_.spans.size() && workers.go_on(); i = next_span_++) {
      Place& place = ring[turn++ % ring.size()];
      wait_for(place.copies);
      place.copies.reset();
      if (!place.slot) place.slot.emplace(device_->slots().acquire());
      const Bytes bytes{plan_.spans[i], place.slot->data(), no_extent};
      read(bytes, workers);
      if (!workers.go_on()) break;
      const std::vector<ArrivedPiece> pieces = arrived(bytes, workers);
      if (!pieces.empty()) place.copies = device_->copy(pieces);
    }
    for (Place& place : ring) wait_for(place.copies);
  }

  static void wait_for(const std::unique_ptr<QueuedCopies>& copies) {
    if (!copies) return;
    const ProfiledStep step("statedict_io::host_to_device");
    copies->wait();
  }

  static char* at(const Bytes& bytes, uint64_t file_offset) { return bytes.memory + (file_offset - bytes.span.begin); }

  // The payloads' parts of a span.
  std::vector<ArrivedPiece> arrived(const Bytes& bytes, WorkerThreads& workers) {
    const PlannedSpan& span = bytes.span;
    std::vector<ArrivedPiece> pieces;
    for (size_t i = span.first_record; i < plan_.records.size() && plan_.records[i].begin < span.end; ++i) {
      const PlannedRecord& planned = plan_.records[i];
      if (planned.sure_begin > span.end && planned.crosses) continue;  // the span in which its header ends sends this
      const uint64_t payload = planned.crosses ? payload_begin_of_crossing(i, workers)
                                               : directory_.payload_offset(planned.record, at(bytes, planned.begin));
      if (payload == 0) return {};
      const uint64_t from = std::max(span.begin, payload);
      const uint64_t to = std::min(span.end, payload + planned.nbytes);
      if (from < to) pieces.push_back({planned.request, from - payload, to - from, at(bytes, from)});
      if (payload < span.begin && planned.sure_begin > span.begin) {
        const uint64_t before = std::min(span.begin - payload, planned.nbytes);
        if (before != 0) pieces.push_back({planned.request, 0, before, kept(i, payload)});
      }
    }
    return pieces;
  }

  // Waits for the spans before, in which the record's header is: workers take spans in file order and wait only when
  // theirs is read, so that ends. 0 where the read was cancelled.
  uint64_t payload_begin_of_crossing(size_t i, WorkerThreads& workers) {
    std::unique_lock<std::mutex> lock(mutex_);
    head_is_known_.wait(lock, [&] { return states_[i].payload_begin != 0 || !workers.go_on(); });
    return states_[i].payload_begin;
  }

  void wake_waiting() {
    const std::lock_guard<std::mutex> lock(mutex_);
    head_is_known_.notify_all();
  }

  // [begin, end) of a crossing record's head has been kept.
  void add_head(size_t i, uint64_t begin, uint64_t end) {
    if (begin >= end || states_[i].head_nbytes_left.fetch_sub(end - begin, std::memory_order_acq_rel) != end - begin) {
      return;
    }
    const PlannedRecord& planned = plan_.records[i];
    states_[i].payload_begin = directory_.payload_offset(planned.record, kept(i, planned.begin));
    wake_waiting();
  }

  void read(const Bytes& bytes, WorkerThreads& workers) {
    const PlannedSpan& span = bytes.span;
    size_t record = span.first_record;
    if (source_.prefers_direct(span.begin, span.end - span.begin)) {
      {
        const ProfiledStep step("statedict_io::read");
        source_.read_aligned(span.begin, bytes.memory, span.end - span.begin);
      }
      absorb(bytes, span.begin, span.end, record);
      return;
    }
    for (uint64_t begin = span.begin; begin < span.end && workers.go_on(); begin += kBlockNbytes) {
      const uint64_t end = std::min(span.end, begin + kBlockNbytes);
      {
        const ProfiledStep step("statedict_io::read");
        source_.read(begin, bytes.memory + (begin - span.begin), end - begin);
      }
      absorb(bytes, begin, end, record);
    }
  }

  // [begin, end) of the span has been read; `record` is the first that reaches into it, and becomes that of the next
  // call.
  void absorb(const Bytes& bytes, uint64_t begin, uint64_t end, size_t& record) {
    for (size_t i = record; i < plan_.records.size() && plan_.records[i].begin < end; ++i) {
      const PlannedRecord& planned = plan_.records[i];
      if (planned.end <= end) record = i + 1;
      const uint64_t from = std::max(begin, planned.begin);
      const uint64_t to = std::min(end, planned.end);
      if (checksum_) add_sure(bytes, i, std::max(from, planned.sure_begin), std::min(to, planned.sure_end));
      if (planned.crosses) {
        keep(bytes, i, from, std::min(to, planned.sure_begin));
        keep(bytes, i, std::max(from, planned.sure_end), to);
        if (device_ != nullptr) add_head(i, from, std::min(to, planned.sure_begin));
      }
      if (states_[i].nbytes_left.fetch_sub(to - from, std::memory_order_acq_rel) == to - from) finish(bytes, i);
    }
    bytes_done_ += end - begin;
  }

  void add_sure(const Bytes& bytes, size_t i, uint64_t begin, uint64_t end) {
    if (begin >= end) return;
    const ProfiledStep step("statedict_io::crc32");
    const uint32_t crc = crc32(0, bytes.memory + (begin - bytes.span.begin), end - begin);
    states_[i].sure_crc.fetch_xor(crc32_shift(crc, plan_.records[i].sure_end - end), std::memory_order_relaxed);
  }

  // Copies [begin, end) of a crossing record out of the slot.
  void keep(const Bytes& bytes, size_t i, uint64_t begin, uint64_t end) {
    if (begin >= end) return;
    const PlannedRecord& planned = plan_.records[i];
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!states_[i].around_sure) {
        states_[i].around_sure.reset(new char[planned.sure_begin - planned.begin + planned.end - planned.sure_end]);
      }
    }
    std::memcpy(kept(i, begin), bytes.memory + (begin - bytes.span.begin), end - begin);
  }

  char* kept(size_t i, uint64_t file_offset) const {
    const PlannedRecord& planned = plan_.records[i];
    char* const memory = states_[i].around_sure.get();
    return file_offset <= planned.sure_begin
               ? memory + (file_offset - planned.begin)
               : memory + (planned.sure_begin - planned.begin) + (file_offset - planned.sure_end);
  }

  // All of the record has been read.
  void finish(const Bytes& bytes, size_t i) {
    const PlannedRecord& planned = plan_.records[i];
    RecordState& state = states_[i];
    const auto at = [&](uint64_t file_offset) {
      if (bytes.extent) return bytes.extent->at(file_offset);
      return planned.crosses ? kept(i, file_offset) : bytes.memory + (file_offset - bytes.span.begin);
    };
    const uint64_t begin = directory_.payload_offset(planned.record, at(planned.begin));
    const uint64_t end = begin + planned.nbytes;
    char* const payload = at(begin);
    if (planned.sure_begin < planned.sure_end) {
      if (checksum_) {
        const uint32_t head = crc32(0, payload, planned.sure_begin - begin);
        const uint32_t tail = crc32(0, at(planned.sure_end), end - planned.sure_end);
        crcs[planned.request] =
            crc32_shift(head, end - planned.sure_begin) ^ crc32_shift(state.sure_crc, end - planned.sure_end) ^ tail;
      }
      if (memory_ != nullptr) adopt_or_copy(bytes, i, payload);
    } else if (memory_ == nullptr) {
      if (checksum_) crcs[planned.request] = crc32(0, payload, planned.nbytes);
    } else if (!checksum_) {
      adopt_or_copy(bytes, i, payload);
    } else if (planned.nbytes < kMinPayloadInExtentNbytes) {
      char* const destination = memory_->allocate(planned.request, planned.nbytes);
      crcs[planned.request] = planned.nbytes != 0 ? crc32_copy(0, destination, payload, planned.nbytes) : 0;
    } else {
      crcs[planned.request] = crc32(0, payload, planned.nbytes);
      adopt_or_copy(bytes, i, payload);
    }
    // What a header shares with the next span is still copied from.
    if (device_ == nullptr || planned.begin / span_nbytes_ == (planned.sure_begin - 1) / span_nbytes_) {
      state.around_sure.reset();
    }
  }

  void adopt_or_copy(const Bytes& bytes, size_t i, char* payload) {
    const PlannedRecord& planned = plan_.records[i];
    if (planned.nbytes < kMinPayloadInExtentNbytes || !bytes.extent) {
      char* const destination = memory_->allocate(planned.request, planned.nbytes);
      if (planned.nbytes != 0) std::memcpy(destination, payload, planned.nbytes);
      return;
    }
    // Writers other than torch do not align. The local header before the payload leaves room to.
    const uintptr_t misalignment = reinterpret_cast<uintptr_t>(payload) % kPayloadAlignment;
    if (misalignment != 0) std::memmove(payload - misalignment, payload, planned.nbytes);
    states_[i].adopted = payload - misalignment;
    memory_->adopt(planned.request, states_[i].adopted, planned.nbytes, bytes.extent);
  }

  // What lies between the payloads that stayed in an extent goes back to the system where it is worth it.
  void release_gaps() {
    size_t i = 0;
    for (size_t extent = 0; extent < extents_.size(); ++extent) {
      const uint64_t end_offset = plan_.extents[extent].end;
      if (!extents_[extent]) {
        while (i < plan_.records.size() && plan_.records[i].end <= end_offset) ++i;
        continue;
      }
      char* gap = extents_[extent]->at(plan_.extents[extent].begin);
      for (; i < plan_.records.size() && plan_.records[i].end <= end_offset; ++i) {
        if (states_[i].adopted == nullptr) continue;
        release_gap(gap, states_[i].adopted, plan_.records[i].nbytes);
        gap = states_[i].adopted + plan_.records[i].nbytes;
      }
      ExtentMemory::release(gap, static_cast<uint64_t>(extents_[extent]->at(end_offset) - gap));
    }
  }

  static void release_gap(char* begin, char* end, uint64_t payload_nbytes) {
    const auto nbytes = static_cast<uint64_t>(end - begin);
    if (nbytes >= payload_nbytes / kKeptGapShare) ExtentMemory::release(begin, nbytes);
  }

  const Directory& directory_;
  PositionalSource& source_;
  const uint64_t span_nbytes_;
  const ReadPlan plan_;
  PayloadMemory* const memory_;      // null: nothing stays in host memory
  DeviceDestination* const device_;  // null: nothing goes to a device
  const bool checksum_;
  const size_t num_threads_;
  const std::unique_ptr<RecordState[]> states_;  // of plan_.records
  std::vector<std::shared_ptr<ExtentMemory>> extents_;
  std::atomic<size_t> next_span_{0};
  std::atomic<bool> faulting_in_{false};
  std::atomic<uint64_t> bytes_done_{0};
  std::mutex mutex_;
  std::condition_variable head_is_known_;
};

std::vector<size_t> with_wrong_crc(const Directory& directory, const std::vector<size_t>& records,
                                   const std::vector<uint32_t>& crcs) {
  std::vector<size_t> wrong;
  for (size_t i = 0; i < crcs.size(); ++i) {
    if (directory[records[i]].crc32 != crcs[i]) wrong.push_back(records[i]);
  }
  std::sort(wrong.begin(), wrong.end());
  return wrong;
}

}  // namespace

std::vector<size_t> load_payloads(const Directory& directory, PositionalSource& source,
                                  const std::vector<size_t>& records, PayloadMemory& memory, bool verify,
                                  const ReadOptions& options, const ReadWatcher& watch) {
  ParallelRead read(directory, source, records, &memory, nullptr, verify, options);
  read.run(watch);
  return with_wrong_crc(directory, records, read.crcs);
}

std::vector<size_t> load_payloads_onto(const Directory& directory, PositionalSource& source,
                                       const std::vector<size_t>& records, DeviceDestination& device, bool verify,
                                       const ReadOptions& options, const ReadWatcher& watch) {
  ParallelRead read(directory, source, records, nullptr, &device, verify, options);
  read.run(watch);
  return with_wrong_crc(directory, records, read.crcs);
}

std::vector<uint32_t> payload_checksums(const Directory& directory, PositionalSource& source,
                                        const std::vector<size_t>& records, const ReadOptions& options,
                                        const ReadWatcher& watch) {
  ParallelRead read(directory, source, records, nullptr, nullptr, true, options);
  read.run(watch);
  return std::move(read.crcs);
}

}  // namespace sdio
