#include "pipeline/write/strip_plan.h"

#include <algorithm>

namespace sdio {
namespace {

// Shorter rows are written one by one.
constexpr uint64_t kLongRowNbytes = 64u << 10;

}  // namespace

StripPlan::StripPlan(const std::vector<Strip>& strips, uint64_t region_nbytes, uint64_t alignment) {
  std::vector<RowPart> long_rows;
  for (size_t i = 0; i < strips.size(); ++i) {
    const Strip& strip = strips[i];
    nbytes += strip.nbytes();
    if (strip.nbytes() == 0) continue;
    if (strip.num_rows == 1 || strip.row_nbytes >= kLongRowNbytes) {
      for (uint64_t row = 0; row < strip.num_rows; ++row) {
        const uint64_t after = strip.nbytes_after + (strip.num_rows - 1 - row) * strip.file_pitch;
        long_rows.push_back(
            {i, row * strip.row_nbytes, strip.file_offset + row * strip.file_pitch, strip.row_nbytes, after});
      }
    } else {
      const uint64_t rows_at_once = std::max<uint64_t>(region_nbytes / strip.row_nbytes, 1);
      for (uint64_t row = 0; row < strip.num_rows; row += rows_at_once) {
        blocks.push_back({i, row, std::min(rows_at_once, strip.num_rows - row)});
      }
    }
  }
  std::sort(long_rows.begin(), long_rows.end(),
            [](const RowPart& a, const RowPart& b) { return a.file_offset < b.file_offset; });
  for (const RowPart& row : long_rows) cut_into_regions(row, region_nbytes, alignment);
}

// A region begins, at a block, where the one before has ended and something is to be written.
void StripPlan::cut_into_regions(RowPart row, uint64_t region_nbytes, uint64_t alignment) {
  while (row.nbytes != 0) {
    if (regions.empty() || row.file_offset >= regions.back().file_offset + region_nbytes) {
      regions.push_back({row.file_offset / alignment * alignment, parts.size(), 0});
    }
    const uint64_t part_nbytes = std::min(row.nbytes, regions.back().file_offset + region_nbytes - row.file_offset);
    RowPart part = row;
    part.nbytes = part_nbytes;
    part.nbytes_after += row.nbytes - part_nbytes;
    parts.push_back(part);
    ++regions.back().num_parts;
    row.strip_offset += part_nbytes;
    row.file_offset += part_nbytes;
    row.nbytes -= part_nbytes;
  }
}

}  // namespace sdio
