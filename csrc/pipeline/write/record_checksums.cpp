#include "pipeline/write/record_checksums.h"

#include <algorithm>
#include <cstring>

#include "checksum/crc32.h"

namespace sdio {

RecordChecksums::RecordChecksums(const FileLayout& layout)
    : layout_(layout), states_(new State[layout.num_records()]), records_left_(0) {
  size_t unfinished = 0;
  for (size_t record = 0; record < layout.num_records(); ++record) {
    states_[record].nbytes_left = layout.placement(record).nbytes;
    if (layout.placement(record).nbytes != 0) ++unfinished;
  }
  records_left_ = unfinished;
}

void RecordChecksums::add(size_t record, uint64_t record_offset, const char* bytes, uint64_t nbytes, uint32_t crc) {
  State& state = states_[record];
  const uint64_t record_nbytes = layout_.placement(record).nbytes;
  if (record_offset < sizeof state.first_bytes) {
    std::memcpy(state.first_bytes + record_offset, bytes,
                static_cast<size_t>(std::min<uint64_t>(nbytes, sizeof state.first_bytes - record_offset)));
  }
  const uint64_t nbytes_after = record_nbytes - record_offset - nbytes;
  state.crc.fetch_xor(nbytes_after == 0 ? crc : crc32_shift(crc, nbytes_after));
  if (state.nbytes_left.fetch_sub(nbytes) == nbytes) completed();
}

void RecordChecksums::set_complete(size_t record) {
  if (states_[record].nbytes_left.exchange(0) != 0) completed();
}

void RecordChecksums::completed() {
  --records_left_;
  if (waiting_ > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }
}

template <typename Predicate>
void RecordChecksums::wait_until(Predicate done) {
  if (done()) return;
  // The count is raised before the predicate is looked at again: either completed() sees that somebody waits, or the
  // predicate sees what completed() did.
  ++waiting_;
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return cancelled_ || done(); });
  --waiting_;
  if (!done()) throw Cancelled();
}

uint32_t RecordChecksums::wait(size_t record) {
  wait_until([&] { return states_[record].nbytes_left == 0; });
  return states_[record].crc;
}

void RecordChecksums::wait_for_all_but(size_t record) {
  wait_until([&] { return records_left_ == (states_[record].nbytes_left == 0 ? 0u : 1u); });
}

void RecordChecksums::cancel() {
  cancelled_ = true;
  std::lock_guard<std::mutex> lock(mutex_);
  changed_.notify_all();
}

}  // namespace sdio
