#include "pipeline/read/parallel_read.h"

#include <unistd.h>

#include <algorithm>
#include <thread>

#include "archive/zip_structures.h"
#include "checksum/crc32.h"
#include "pipeline/memory/extent_memory.h"
#include "pipeline/memory/slot_pool.h"
#include "pipeline/threads/profiled_step.h"

namespace sdio {
namespace {

// A buffered read of this size is still in the cache when it is checksummed or copied.
constexpr uint64_t kBlockNbytes = 1u << 20;
// Below this, starting threads costs more than it saves.
constexpr uint64_t kThreadsFromNbytes = 4u << 20;
// Of a local header and the name behind it, whose length has 16 bits.
constexpr uint64_t kMaxNameEndNbytes = kLocalHeaderNbytes + 0xffff;

}  // namespace

size_t threads_for_slots() { return std::clamp<size_t>(std::thread::hardware_concurrency(), 4, 8); }

ParallelRead::ParallelRead(const Directory& directory, PositionalSource& source, const std::vector<size_t>& records,
                           ReadPlan::Keep keep, bool checksum, const ReadOptions& options, size_t default_num_threads)
    : directory_(directory),
      source_(source),
      plan_(directory, records, keep, plan_alignment(source),
            options.span_nbytes != 0 ? options.span_nbytes : kSlotNbytes),
      checksum_(checksum),
      num_threads_(num_threads(options, default_num_threads)),
      crcs_(checksum ? records.size() : 0),
      states_(std::make_unique<RecordState[]>(records.size())) {
  for (size_t i = 0; i < plan_.records.size(); ++i) {
    const PlannedRecord& planned = plan_.records[i];
    states_[i].nbytes_left = planned.end - planned.begin;
    if (!planned.has_header) states_[i].payload_begin = planned.begin;
  }
}

uint64_t ParallelRead::plan_alignment(const PositionalSource& source) {
  return std::max<uint64_t>(source.alignment(), static_cast<uint64_t>(sysconf(_SC_PAGESIZE)));
}

size_t ParallelRead::num_threads(const ReadOptions& options, size_t default_num_threads) const {
  const size_t wanted = options.num_threads != 0 ? options.num_threads : default_num_threads;
  const size_t useful = std::min(wanted, plan_.spans.size());
  return useful > 1 && plan_.nbytes >= kThreadsFromNbytes ? useful : 0;
}

void ParallelRead::run(const ReadWatcher& watch) {
  read_headers(watch);
  WorkerThreads workers;
  workers.run(num_threads_, [&] { work(workers); }, [&] { watch(bytes_done_, plan_.nbytes); });
  all_read();
  watch(plan_.nbytes, plan_.nbytes);
}

// Of the records that lie in several spans.
void ParallelRead::read_headers(const ReadWatcher& watch) {
  const std::vector<size_t>& records = plan_.in_several_spans;
  if (records.empty()) return;
  std::atomic<size_t> next{0};
  WorkerThreads workers;
  const auto work = [&] {
    // Room for a direct read of the longest name, from the block in which the header begins to that in which it ends.
    const ExtentMemory memory(0, kMaxNameEndNbytes + 2 * plan_alignment(source_));
    for (size_t i = next++; i < records.size() && workers.go_on(); i = next++) {
      const ProfiledStep step("statedict_io::read");
      states_[records[i]].payload_begin = read_payload_begin(plan_.records[records[i]].record, memory.at(0));
    }
  };
  workers.run(records.size() > 1 ? std::min(num_threads_, records.size()) : 0, work, [&] { watch(0, plan_.nbytes); });
}

// Past the page cache, where the spans are read so: a block that is cached for its header could pass for a cached span.
uint64_t ParallelRead::read_payload_begin(size_t record, char* memory) {
  const uint64_t header = directory_[record].header_offset;
  const uint64_t begin = header / plan_alignment(source_) * plan_alignment(source_);
  const uint64_t nbytes = directory_[record].min_payload_offset() - begin;
  if (source_.prefers_direct(begin, nbytes)) {
    source_.read_aligned(begin, memory, nbytes);
  } else {
    source_.read(header, memory + (header - begin), begin + nbytes - header);
  }
  return directory_.payload_offset(record, memory + (header - begin));
}

std::vector<size_t> ParallelRead::with_wrong_crc() const {
  std::vector<size_t> wrong;
  for (size_t i = 0; checksum_ && i < plan_.records.size(); ++i) {
    const PlannedRecord& planned = plan_.records[i];
    if (directory_[planned.record].crc32 != crcs_[planned.request]) wrong.push_back(planned.record);
  }
  std::sort(wrong.begin(), wrong.end());
  return wrong;
}

void ParallelRead::read(const SpanMemory& to, WorkerThreads& workers) {
  const PlannedSpan& span = to.span;
  size_t first_record = span.first_record;
  if (source_.prefers_direct(span.begin, span.end - span.begin)) {
    {
      const ProfiledStep step("statedict_io::read");
      source_.read_aligned(span.begin, to.memory, span.end - span.begin);
    }
    absorb(to, span.begin, span.end, first_record);
    return;
  }
  for (uint64_t begin = span.begin; begin < span.end && workers.go_on(); begin += kBlockNbytes) {
    const uint64_t end = std::min(span.end, begin + kBlockNbytes);
    {
      const ProfiledStep step("statedict_io::read");
      source_.read(begin, to.at(begin), end - begin);
    }
    absorb(to, begin, end, first_record);
  }
}

// [begin, end) of the span has been read. `first_record` is the first that reaches into it; it becomes that of the next
// call for this span.
void ParallelRead::absorb(const SpanMemory& bytes, uint64_t begin, uint64_t end, size_t& first_record) {
  for (size_t i = first_record; i < bytes.span.end_record && plan_.records[i].begin < end; ++i) {
    const PlannedRecord& planned = plan_.records[i];
    if (planned.end <= end) first_record = i + 1;
    const uint64_t from = std::max(begin, planned.begin);
    const uint64_t to = std::min(end, planned.end);
    if (find_payload(bytes, i, to) && checksum_ && planned.is_large()) add_crc(bytes, i, from, to);
    if (states_[i].nbytes_left.fetch_sub(to - from, std::memory_order_acq_rel) == to - from) finish(i, bytes);
  }
  bytes_done_ += end - begin;
}

// The span has been read up to `end`. False where that leaves a part of the record's header to be read.
bool ParallelRead::find_payload(const SpanMemory& bytes, size_t index, uint64_t end) {
  uint64_t& payload_begin = states_[index].payload_begin;
  if (payload_begin != 0) return true;
  const PlannedRecord& planned = plan_.records[index];
  if (directory_[planned.record].min_payload_offset() > end) return false;
  payload_begin = directory_.payload_offset(planned.record, bytes.at(planned.begin));
  return true;
}

// Adds what [begin, end) has of the payload.
void ParallelRead::add_crc(const SpanMemory& bytes, size_t index, uint64_t begin, uint64_t end) {
  RecordState& state = states_[index];
  const uint64_t payload_end = state.payload_begin + plan_.records[index].nbytes;
  const uint64_t from = std::max(begin, state.payload_begin);
  const uint64_t to = std::min(end, payload_end);
  if (from >= to) return;
  const ProfiledStep step("statedict_io::crc32");
  state.crc.fetch_xor(crc32_shift(crc32(0, bytes.at(from), to - from), payload_end - to), std::memory_order_relaxed);
}

void ParallelRead::finish(size_t index, const SpanMemory& last) {
  if (!checksum_) return;
  const PlannedRecord& planned = plan_.records[index];
  crcs_[planned.request] =
      planned.is_large() ? states_[index].crc.load() : crc32(0, last.at(payload_begin(index)), planned.nbytes);
}

}  // namespace sdio
