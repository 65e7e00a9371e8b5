#include "pipeline/read/read_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sdio {
namespace {

// So many bytes between two records are read along: that costs less than another call.
constexpr uint64_t kMaxGapNbytes = 64u << 10;
// So many bytes of small records between large ones are read with them; more would waste memory of the mirror.
constexpr uint64_t kMaxSmallRunNbytes = 64u << 10;
// A span of small records, which are copied while they are in the cache.
constexpr uint64_t kSmallSpanNbytes = 1u << 20;

}  // namespace

ReadPlan::ReadPlan(const Directory& directory, const std::vector<size_t>& requested, Keep keep, uint64_t alignment,
                   uint64_t span_nbytes) {
  records.reserve(requested.size());
  for (size_t request = 0; request < requested.size(); ++request) {
    const size_t index = requested[request];
    if (index >= directory.num_records()) throw std::invalid_argument("no record " + std::to_string(index));
    const DirectoryRecord& record = directory[index];
    if (record.compressed) throw std::invalid_argument("record " + std::to_string(index) + " is compressed");
    if (!record.has_header && record.nbytes == 0) {
      throw std::invalid_argument("record " + std::to_string(index) + " is empty");
    }
    const uint64_t end = record.max_payload_offset() + record.nbytes;
    records.push_back({index, request, record.header_offset, end, record.nbytes, record.has_header});
  }
  const auto before = [](const PlannedRecord& a, const PlannedRecord& b) { return a.begin < b.begin; };
  if (!std::is_sorted(records.begin(), records.end(), before)) std::sort(records.begin(), records.end(), before);
  for (size_t i = 1; i < records.size(); ++i) {
    if (records[i].record == records[i - 1].record) {
      throw std::invalid_argument("record " + std::to_string(records[i].record) + " twice");
    }
  }

  const auto near = [&](size_t i) { return records[i].begin - records[i - 1].end <= kMaxGapNbytes; };
  for (size_t first = 0; first < records.size();) {
    const bool mirrored = keep == Keep::kMemory && records[first].is_large();
    size_t end = first + 1;
    uint64_t small_nbytes = 0;
    for (size_t i = end; i < records.size() && near(i); ++i) {
      if (keep == Keep::kNothing || records[i].is_large() == mirrored) {
        end = i + 1;
        small_nbytes = 0;
      } else if (!mirrored || (small_nbytes += records[i].end - records[i].begin) > kMaxSmallRunNbytes) {
        break;
      }
    }
    const bool small = keep == Keep::kMemory && !mirrored;
    add_extent(first, end, mirrored, alignment,
               small ? std::max(alignment, std::min(span_nbytes, kSmallSpanNbytes)) : span_nbytes);
    first = end;
  }
}

// A mirror is cut anywhere, as what lies in two spans lies in one piece in memory; in slots only large records are cut.
void ReadPlan::add_extent(size_t first_record, size_t end_record, bool mirrored, uint64_t alignment,
                          uint64_t span_nbytes) {
  uint64_t begin = records[first_record].begin / alignment * alignment;
  extents.push_back({begin, records[end_record - 1].end, mirrored});
  const auto add_span = [&](uint64_t end, size_t first, size_t last) {
    spans.push_back({begin, end, extents.size() - 1, first, last});
    nbytes += end - begin;
  };
  for (size_t first = first_record; first < end_record;) {
    const uint64_t limit = mirrored ? (begin / span_nbytes + 1) * span_nbytes : begin + span_nbytes;
    size_t next = first;  // the first record that does not end in this span
    while (next < end_record && records[next].end <= limit) ++next;
    const bool begins_before = next < end_record && records[next].begin < limit;
    if (next < end_record && (mirrored || (begins_before && records[next].is_large()))) {
      if (begins_before && records[next].begin >= begin && records[next].has_header) in_several_spans.push_back(next);
      add_span(limit, first, begins_before ? next + 1 : next);
      begin = limit;
    } else {
      next = std::max(next, first + 1);
      add_span(records[next - 1].end, first, next);
      if (next < end_record) begin = records[next].begin / alignment * alignment;
    }
    first = next;
  }
}

}  // namespace sdio
