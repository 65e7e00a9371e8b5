// What to read, in which pieces: records -> extents -> spans.
//
// Pure; immutable after construction. Neighbouring records make an extent: one run of the file, read with the headers
// and the few other bytes that lie between. An extent of large records is mirrored in memory; one of small records goes
// through slots, from which they are copied. Extents are cut into spans, the units that workers take.
//
// The plan knows no offsets of payloads: those are known only once the local header has been read, never from a rule.
// A payload can begin anywhere between its header and its latest possible begin. Its sure part reaches from there to
// its earliest possible end: bytes that are payload wherever it begins, all but some hundred.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "archive/directory.h"

namespace sdio {

// A payload of this size or more stays in the extent it was read to; a smaller one would pin it for little.
inline constexpr uint64_t kMinPayloadInExtentNbytes = 64u << 10;

struct PlannedRecord {
  size_t record;        // in the directory
  size_t request;       // in the caller's list
  uint64_t begin;       // its local header
  uint64_t end;         // wherever the payload begins, it ends here or before
  uint64_t sure_begin;  // [sure_begin, sure_end) is payload wherever it begins; empty for small records
  uint64_t sure_end;
  uint64_t nbytes;
  bool crosses = false;  // from one span of a slot into the next

  bool is_large() const { return nbytes >= kMinPayloadInExtentNbytes; }
};

struct PlannedExtent {
  uint64_t begin;  // a multiple of the alignment
  uint64_t end;
  bool mirrored;
};

struct PlannedSpan {
  uint64_t begin;  // a multiple of the alignment
  uint64_t end;
  size_t extent;
  size_t first_record;  // the first planned record that reaches into it
};

struct ReadPlan {
  // kMemory: payloads are wanted. kNothing: they are looked at in slots.
  enum class Keep { kMemory, kNothing };

  // `records`: indices into `directory`, each at most once, none compressed. `span_nbytes`: at most kSlotNbytes, a
  // multiple of `alignment`. Throws std::invalid_argument.
  ReadPlan(const Directory& directory, const std::vector<size_t>& requested, Keep keep, uint64_t alignment,
           uint64_t span_nbytes);

  std::vector<PlannedRecord> records;  // in file order
  std::vector<PlannedExtent> extents;
  std::vector<PlannedSpan> spans;  // in file order
  uint64_t nbytes = 0;             // of all spans

 private:
  void add_extent(size_t first, size_t last, bool mirrored, uint64_t alignment, uint64_t span_nbytes);
};

}  // namespace sdio
