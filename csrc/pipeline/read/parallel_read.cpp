#include "pipeline/read/parallel_read.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "checksum/crc32.h"
#include "pipeline/memory/slot_pool.h"
#include "pipeline/threads/profiled_step.h"

namespace sdio {
namespace {

// A buffered read of this size is still in the cache when it is checksummed or copied.
constexpr uint64_t kBlockNbytes = 1u << 20;
// Below this, starting threads costs more than it saves.
constexpr uint64_t kThreadsFromNbytes = 4u << 20;

}  // namespace

size_t threads_for_slots() { return std::clamp<size_t>(std::thread::hardware_concurrency(), 4, 8); }

ParallelRead::ParallelRead(const Directory& directory, PositionalSource& source, const std::vector<size_t>& records,
                           ReadPlan::Keep keep, bool checksum, const ReadOptions& options, size_t default_num_threads)
    : directory_(directory),
      source_(source),
      span_nbytes_(options.span_nbytes != 0 ? options.span_nbytes : kSlotNbytes),
      plan_(directory, records, keep, plan_alignment(source), span_nbytes_),
      checksum_(checksum),
      num_threads_(num_threads(options, default_num_threads)),
      crcs_(checksum ? records.size() : 0),
      states_(std::make_unique<RecordState[]>(records.size())) {
  for (size_t i = 0; i < plan_.records.size(); ++i) {
    states_[i].nbytes_left = plan_.records[i].end - plan_.records[i].begin;
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
  WorkerThreads workers([this] { cancel(); });
  workers.run(num_threads_, [&] { work(workers); }, [&] { watch(bytes_done_, plan_.nbytes); });
  all_read();
  watch(plan_.nbytes, plan_.nbytes);
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
  for (size_t i = first_record; i < plan_.records.size() && plan_.records[i].begin < end; ++i) {
    const PlannedRecord& planned = plan_.records[i];
    if (planned.end <= end) first_record = i + 1;
    const uint64_t from = std::max(begin, planned.begin);
    const uint64_t to = std::min(end, planned.end);
    if (checksum_) add_sure(bytes, i, std::max(from, planned.sure_begin), std::min(to, planned.sure_end));
    if (planned.crosses) {
      const uint64_t head_end = std::min(to, planned.sure_begin);
      keep(bytes, i, from, head_end);
      keep(bytes, i, std::max(from, planned.sure_end), to);
      if (from < head_end) kept_head(i, from, head_end);
    }
    if (states_[i].nbytes_left.fetch_sub(to - from, std::memory_order_acq_rel) != to - from) continue;
    finish(payload_of(bytes, i));
    if (!keeps_head(planned)) states_[i].around_sure.reset();
  }
  bytes_done_ += end - begin;
}

void ParallelRead::add_sure(const SpanMemory& bytes, size_t index, uint64_t begin, uint64_t end) {
  if (begin >= end) return;
  const ProfiledStep step("statedict_io::crc32");
  const uint32_t crc = crc32(0, bytes.at(begin), end - begin);
  states_[index].sure_crc.fetch_xor(crc32_shift(crc, plan_.records[index].sure_end - end), std::memory_order_relaxed);
}

// Copies [begin, end) of a record that crosses out of the slot.
void ParallelRead::keep(const SpanMemory& bytes, size_t index, uint64_t begin, uint64_t end) {
  if (begin >= end) return;
  const PlannedRecord& planned = plan_.records[index];
  {
    const std::lock_guard<std::mutex> lock(keeping_);
    std::unique_ptr<char[]>& around_sure = states_[index].around_sure;
    if (!around_sure) {
      around_sure.reset(new char[planned.sure_begin - planned.begin + planned.end - planned.sure_end]);
    }
  }
  std::memcpy(kept(index, begin), bytes.at(begin), end - begin);
}

char* ParallelRead::kept(size_t index, uint64_t file_offset) const {
  const PlannedRecord& planned = plan_.records[index];
  char* const head = states_[index].around_sure.get();
  if (file_offset <= planned.sure_begin) return head + (file_offset - planned.begin);
  char* const tail = head + (planned.sure_begin - planned.begin);
  return tail + (file_offset - planned.sure_end);
}

ParallelRead::ReadPayload ParallelRead::payload_of(const SpanMemory& last, size_t index) const {
  const PlannedRecord& planned = plan_.records[index];
  const auto at = [&](uint64_t file_offset) {
    return planned.crosses ? kept(index, file_offset) : last.at(file_offset);
  };
  const uint64_t file_offset = directory_.payload_offset(planned.record, at(planned.begin));
  return {index, planned, last, file_offset, at(file_offset), at(planned.sure_end)};
}

uint32_t ParallelRead::crc_of(const ReadPayload& payload) const {
  const PlannedRecord& planned = payload.planned;
  if (planned.sure_begin == planned.sure_end) return crc32(0, payload.data, planned.nbytes);
  const uint64_t end = payload.file_offset + planned.nbytes;
  const uint64_t tail_nbytes = end - planned.sure_end;
  const uint32_t head = crc32(0, payload.data, planned.sure_begin - payload.file_offset);
  const uint32_t tail = crc32(0, payload.after_sure, tail_nbytes);
  return crc32_shift(head, end - planned.sure_begin) ^ crc32_shift(states_[payload.index].sure_crc, tail_nbytes) ^ tail;
}

}  // namespace sdio
