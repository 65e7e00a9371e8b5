// Which bytes of strips are written together.
//
// Pure; immutable after construction. Long rows are cut into parts, and parts that are near each other in the file make
// a region, which is written out of one slot. Short rows are taken in blocks of one strip.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pipeline/write/strip.h"

namespace sdio {

// Bytes of a long row that lie in one region.
struct RowPart {
  size_t strip;
  uint64_t strip_offset;
  uint64_t file_offset;
  uint64_t nbytes;
  uint64_t nbytes_after;  // of the record
};

struct StripRegion {
  uint64_t file_offset;  // where its slot begins: a multiple of the alignment
  size_t first_part;     // in StripPlan::parts
  size_t num_parts;
};

struct RowBlock {
  size_t strip;
  uint64_t first_row;
  uint64_t num_rows;
};

struct StripPlan {
  // `region_nbytes` is a multiple of `alignment`.
  StripPlan(const std::vector<Strip>& strips, uint64_t region_nbytes, uint64_t alignment);

  std::vector<RowPart> parts;        // in file order
  std::vector<StripRegion> regions;  // in file order
  std::vector<RowBlock> blocks;
  uint64_t nbytes = 0;  // of all strips

 private:
  void cut_into_regions(RowPart row, uint64_t region_nbytes, uint64_t alignment);
};

}  // namespace sdio
