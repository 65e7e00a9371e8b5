#include "archive/file_layout.h"

#include <algorithm>
#include <stdexcept>

namespace sdio {

FileLayout::FileLayout(const std::vector<uint64_t>& sizes) {
  placements_.reserve(sizes.size());
  uint64_t cursor = 0;
  for (const uint64_t nbytes : sizes) {
    if (nbytes > kMaxFileNbytes - cursor) throw std::invalid_argument("the sizes add up to more than a file can hold");
    RecordPlacement at;
    at.header_offset = at.payload_offset = cursor;
    at.nbytes = nbytes;
    placements_.push_back(at);
    cursor += nbytes;
  }
}

size_t FileLayout::record_at(uint64_t file_offset) const {
  const auto after =
      std::upper_bound(placements_.begin(), placements_.end(), file_offset,
                       [](uint64_t offset, const RecordPlacement& at) { return offset < at.end_offset(); });
  return static_cast<size_t>(after - placements_.begin());
}

}  // namespace sdio
