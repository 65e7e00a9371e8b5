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
    PlannedRecord planned = {};
    planned.record = index;
    planned.request = request;
    planned.begin = record.header_offset;
    planned.end = record.max_payload_offset() + record.nbytes;
    planned.nbytes = record.nbytes;
    planned.sure_begin = record.max_payload_offset();
    planned.sure_end = record.min_payload_offset() + record.nbytes;
    if (!planned.is_large() || planned.sure_begin > planned.sure_end) planned.sure_end = planned.sure_begin;
    records.push_back(planned);
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
    size_t last = first;
    uint64_t small_nbytes = 0;
    for (size_t i = first + 1; i < records.size() && near(i); ++i) {
      if (keep == Keep::kNothing || records[i].is_large() == mirrored) {
        last = i;
        small_nbytes = 0;
      } else if (!mirrored || (small_nbytes += records[i].end - records[i].begin) > kMaxSmallRunNbytes) {
        break;
      }
    }
    const bool small = keep == Keep::kMemory && !mirrored;
    add_extent(first, last, mirrored, alignment,
               small ? std::max(alignment, std::min(span_nbytes, kSmallSpanNbytes)) : span_nbytes);
    first = last + 1;
  }
}

void ReadPlan::add_extent(size_t first, size_t last, bool mirrored, uint64_t alignment, uint64_t span_nbytes) {
  const PlannedExtent extent = {records[first].begin / alignment * alignment, records[last].end, mirrored};
  size_t record = first;
  for (uint64_t begin = extent.begin; begin < extent.end;) {
    const uint64_t end = std::min(extent.end, (begin / span_nbytes + 1) * span_nbytes);
    while (records[record].end <= begin) ++record;
    spans.push_back({begin, end, extents.size(), record});
    nbytes += end - begin;
    for (size_t i = record; !mirrored && i <= last && records[i].begin < end; ++i) {
      if (records[i].end > end) records[i].crosses = true;
    }
    begin = end;
  }
  extents.push_back(extent);
}

}  // namespace sdio
