#include "pipeline/write/archive_frame.h"

#include <cstring>
#include <vector>

#include "archive/serialization_id.h"
#include "checksum/crc32.h"

namespace sdio {

ArchiveFrame::ArchiveFrame(const Records& records, const ArchiveLayout& layout)
    : records_(records),
      layout_(layout),
      checksums_(layout),
      tail_{record_names_hash(layout.names(), layout.serialization_id_record()), "",
            std::string(layout.directory_nbytes(), '\0')} {
  for (size_t record = 0; record < records_.payloads.size(); ++record) {
    if (records_.payloads[record].kind == Payload::Kind::kHole) checksums_.set_complete(record);
  }
}

void ArchiveFrame::put_header(size_t record, uint64_t skip, uint64_t nbytes, char* destination) const {
  const RecordPlacement& at = layout_.placement(record);
  if (nbytes == at.header_nbytes()) {
    layout_.write_header(record, destination);
  } else {
    std::string whole(at.header_nbytes(), '\0');
    layout_.write_header(record, &whole[0]);
    std::memcpy(destination, whole.data() + skip, nbytes);
  }
}

void ArchiveFrame::put(Part part, size_t record, uint64_t skip, uint64_t nbytes, char* destination) {
  char descriptor[24];
  const char* source = descriptor;
  if (part == Part::kDescriptor) {
    if (record == layout_.serialization_id_record()) tail();
    layout_.write_descriptor(record, checksums_.wait(record), descriptor);
  } else if (part == Part::kSerializationId) {
    source = tail().serialization_id.data();
  } else {
    source = tail().directory.data();
  }
  std::memcpy(destination, source + skip, nbytes);
}

uint64_t ArchiveFrame::offset_of(Part part, size_t record) const {
  if (part == Part::kDirectory) return layout_.directory_offset();
  const RecordPlacement& at = layout_.placement(record);
  return part == Part::kDescriptor ? at.descriptor_offset() : at.payload_offset;
}

const ArchiveFrame::Tail& ArchiveFrame::tail() {
  // Not std::call_once: it may hang when the callable throws (GCC bug 66146), as Cancelled does here.
  std::lock_guard<std::mutex> lock(tail_mutex_);
  if (!tail_.serialization_id.empty()) return tail_;
  const size_t id_record = layout_.serialization_id_record();
  checksums_.wait_for_all_but(id_record);
  std::vector<uint32_t> crcs;
  crcs.reserve(id_record + 1);
  CrcFold fold;
  for (size_t record = 0; record < id_record; ++record) {
    const uint64_t nbytes = layout_.placement(record).nbytes;
    crcs.push_back(checksums_.crc(record));
    const bool has_start = nbytes >= 8 && records_.kind(record) != Payload::Kind::kHole;
    const unsigned char* const first_bytes = has_start ? checksums_.first_bytes(record) : nullptr;
    fold.fold_record(layout_.archive_name(), layout_.name(record), first_bytes, nbytes, crcs.back());
  }
  const std::string id = serialization_id(tail_.names_hash, fold.value());
  const uint32_t crc = records_.compute_crc32 ? crc32(0, id.data(), id.size()) : 0;
  crcs.push_back(crc);
  layout_.write_directory(crcs, &tail_.directory[0]);
  tail_.serialization_id = id;
  checksums_.add(id_record, 0, id.data(), id.size(), crc);
  return tail_;
}

}  // namespace sdio
