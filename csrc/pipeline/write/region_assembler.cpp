#include "pipeline/write/region_assembler.h"

#include <algorithm>
#include <cstring>

#include "checksum/crc32.h"
#include "pipeline/threads/profiled_step.h"

namespace sdio {
namespace {

// A smaller piece is copied into the slot: that is cheaper than one more iovec in the system call.
constexpr uint64_t kGatherBelowNbytes = 32u << 10;

}  // namespace

// One call of assemble(): the cursor through the range, and what has to wait until the range's own CRCs are reported.
class RegionAssembler::Range {
 public:
  Range(RegionAssembler& assembler, uint64_t begin, uint64_t nbytes, SlotMemory& slot, Gather gather,
        std::vector<iovec>& pieces)
      : assembler_(assembler),
        layout_(assembler.layout_),
        offset_(begin),
        end_(begin + nbytes),
        cursor_(slot.data()),
        gather_(gather),
        pieces_(pieces) {}

  void run() {
    put_host_bytes();
    copy_device_pieces();
    put_deferred();
  }

 private:
  struct Deferred {
    ArchiveFrame::Part part;
    size_t record;
    uint64_t skip;  // bytes of it that lie in earlier ranges
    uint64_t nbytes;
    char* destination;
  };

  uint64_t nbytes_until(uint64_t offset) const { return offset <= offset_ ? 0 : std::min(offset, end_) - offset_; }

  // Everything but what comes from a device, or depends on the CRCs of other ranges.
  void put_host_bytes() {
    const ProfiledStep step(gather_ == Gather::kAll ? "statedict_io::copy_and_crc32" : "statedict_io::crc32");
    const ReadGate::Reading reading(assembler_.records_.gate);
    for (size_t record = layout_.record_at(offset_); offset_ < end_ && record < layout_.num_records(); ++record) {
      const RecordPlacement& at = layout_.placement(record);
      if (const uint64_t nbytes = nbytes_until(at.payload_offset)) put_header(record, nbytes);
      if (const uint64_t nbytes = nbytes_until(at.descriptor_offset())) put_payload(record, nbytes);
      if (const uint64_t nbytes = nbytes_until(at.end_offset())) defer(ArchiveFrame::Part::kDescriptor, record, nbytes);
    }
    if (const uint64_t nbytes = nbytes_until(layout_.file_nbytes())) defer(ArchiveFrame::Part::kDirectory, 0, nbytes);
  }

  // The next `nbytes` of the range, in the slot.
  char* take(uint64_t nbytes) {
    if (pieces_.empty() || static_cast<char*>(pieces_.back().iov_base) + pieces_.back().iov_len != cursor_) {
      pieces_.push_back({cursor_, 0});
    }
    pieces_.back().iov_len += nbytes;
    offset_ += nbytes;
    cursor_ += nbytes;
    return cursor_ - nbytes;
  }

  void put_header(size_t record, uint64_t nbytes) {
    const uint64_t skip = offset_ - layout_.placement(record).header_offset;
    assembler_.frame_->put_header(record, skip, nbytes, take(nbytes));
  }

  void put_payload(size_t record, uint64_t nbytes) {
    const uint64_t record_offset = offset_ - layout_.placement(record).payload_offset;
    switch (assembler_.records_.kind(record)) {
      case Payload::Kind::kMemory:
        put_memory(record, record_offset, assembler_.records_.payloads[record].data + record_offset, nbytes);
        break;
      case Payload::Kind::kCopied:
        put_copied(record, record_offset, nbytes);
        break;
      case Payload::Kind::kDevice:
        device_pieces_.push_back({record, record_offset, nbytes, take(nbytes)});
        break;
      case Payload::Kind::kHole:
        std::memset(take(nbytes), 0, nbytes);
        break;
      case Payload::Kind::kSerializationId:
        defer(ArchiveFrame::Part::kSerializationId, record, nbytes);
        break;
    }
  }

  void put_copied(size_t record, uint64_t record_offset, uint64_t nbytes) {
    const size_t copy = assembler_.records_.payloads[record].copy;
    for (const uint64_t end = record_offset + nbytes; record_offset < end;) {
      const iovec together = assembler_.records_.copies->bytes(copy, record_offset, end - record_offset);
      put_memory(record, record_offset, static_cast<const char*>(together.iov_base), together.iov_len);
      record_offset += together.iov_len;
    }
  }

  void put_memory(size_t record, uint64_t record_offset, const char* source, uint64_t nbytes) {
    uint32_t crc = 0;
    if (gather_ == Gather::kSmall && nbytes >= kGatherBelowNbytes) {
      crc = assembler_.checksum(source, nbytes);
      pieces_.push_back({const_cast<char*>(source), nbytes});
      offset_ += nbytes;
    } else if (assembler_.computes_crc32_) {
      crc = crc32_copy(0, take(nbytes), source, nbytes);
    } else {
      std::memcpy(take(nbytes), source, nbytes);
    }
    assembler_.add(record, record_offset, source, nbytes, crc);
  }

  void defer(ArchiveFrame::Part part, size_t record, uint64_t nbytes) {
    const uint64_t skip = offset_ - assembler_.frame_->offset_of(part, record);
    deferred_.push_back({part, record, skip, nbytes, take(nbytes)});
  }

  void copy_device_pieces() {
    if (device_pieces_.empty()) return;
    {
      const ProfiledStep step("statedict_io::device_to_host");
      assembler_.records_.devices->copy(device_pieces_);
    }
    const ProfiledStep step("statedict_io::crc32");
    for (const DevicePiece& piece : device_pieces_) {
      const uint32_t crc = assembler_.checksum(piece.destination, piece.nbytes);
      assembler_.add(piece.record, piece.record_offset, piece.destination, piece.nbytes, crc);
    }
  }

  void put_deferred() {
    for (const Deferred& item : deferred_) {
      assembler_.frame_->put(item.part, item.record, item.skip, item.nbytes, item.destination);
    }
  }

  RegionAssembler& assembler_;
  const FileLayout& layout_;
  uint64_t offset_;
  const uint64_t end_;
  char* cursor_;
  const Gather gather_;
  std::vector<iovec>& pieces_;
  std::vector<DevicePiece> device_pieces_;
  std::vector<Deferred> deferred_;
};

RegionAssembler::RegionAssembler(const Records& records) : records_(records), layout_(*records.layout) {
  if (const ArchiveLayout* const archive = layout_.archive()) {
    frame_ = std::make_unique<ArchiveFrame>(records, *archive);
    computes_crc32_ = records.compute_crc32;
  }
}

void RegionAssembler::assemble(uint64_t begin, uint64_t nbytes, SlotMemory& slot, Gather gather,
                               std::vector<iovec>& pieces) {
  Range(*this, begin, nbytes, slot, gather, pieces).run();
}

uint32_t RegionAssembler::checksum(const char* bytes, uint64_t nbytes) const {
  return computes_crc32_ ? crc32(0, bytes, nbytes) : 0;
}

}  // namespace sdio
