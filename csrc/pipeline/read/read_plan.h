// What to read, in which pieces: records -> extents -> spans.
//
// Pure; immutable after construction. Neighbouring records make an extent: one run of the file, read with the headers
// and the few other bytes that lie between. An extent of large records is mirrored in memory; one of small records goes
// through slots, from which they are copied. Extents are cut into spans, the units that workers take.
//
// Where a payload begins is known only once the local header has been read, never from a rule. Most records lie in one
// span, which has the header too. Those in several spans are listed: their headers are read first. There is at most one
// such record for each cut, whatever the sizes of the records. Records of other formats have no header, and are never
// among them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "archive/directory.h"

namespace sdio {

// A payload of this size or more stays in the extent it was read to; a smaller one would pin it for little.
inline constexpr uint64_t kMinPayloadInExtentNbytes = 64u << 10;

struct PlannedRecord {
  size_t record;   // in the directory
  size_t request;  // in the caller's list
  uint64_t begin;  // its local header
  uint64_t end;    // wherever the payload begins, it ends here or before
  uint64_t nbytes;
  bool has_header;

  bool is_large() const { return nbytes >= kMinPayloadInExtentNbytes; }
};

struct PlannedExtent {
  uint64_t begin;  // a multiple of the alignment
  uint64_t end;
  bool mirrored;
};

// Those of a mirror are disjoint. In slots a block may be read twice, for the record that ends and the one that begins
// in it.
struct PlannedSpan {
  uint64_t begin;  // a multiple of the alignment
  uint64_t end;
  size_t extent;
  size_t first_record;  // of [first_record, end_record), the planned records that are read with it, or parts of them
  size_t end_record;
};

struct ReadPlan {
  // kMemory: payloads are wanted. kNothing: they are looked at in slots.
  enum class Keep { kMemory, kNothing };

  // `requested`: indices into `directory`, each at most once, none compressed, none both without a header and empty:
  // nothing would be read for it. `span_nbytes`: at most kSlotNbytes, a
  // multiple of `alignment`; a small record that alone needs more gets it. Throws std::invalid_argument.
  ReadPlan(const Directory& directory, const std::vector<size_t>& requested, Keep keep, uint64_t alignment,
           uint64_t span_nbytes);

  std::vector<PlannedRecord> records;  // in file order
  std::vector<PlannedExtent> extents;
  std::vector<PlannedSpan> spans;        // in file order
  std::vector<size_t> in_several_spans;  // of `records`, in file order; without those that have no header
  uint64_t nbytes = 0;                   // of all spans

 private:
  void add_extent(size_t first_record, size_t end_record, bool mirrored, uint64_t alignment, uint64_t span_nbytes);
};

}  // namespace sdio
