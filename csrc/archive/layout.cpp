#include "archive/layout.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <unordered_set>
#include <utility>

#include "archive/little_endian.h"
#include "archive/zip_structures.h"

namespace sdio {
namespace {

constexpr uint64_t kSerializationIdNbytes = 40;

constexpr char kSerializationIdName[] = ".data/serialization_id";

bool size_needs_zip64(uint64_t nbytes) { return nbytes >= kMax32; }
bool offset_needs_zip64(uint64_t header_offset) { return header_offset >= kMax32; }

uint64_t zip64_extra_nbytes(uint64_t nbytes, uint64_t header_offset) {
  const uint64_t field_nbytes = (size_needs_zip64(nbytes) ? 16u : 0u) + (offset_needs_zip64(header_offset) ? 8u : 0u);
  return field_nbytes == 0 ? 0 : kExtraFieldHeaderNbytes + field_nbytes;
}

// miniz writes the local header before it knows the stored size and leaves 0 there; the central one has it [F: zip64].
char* put_zip64_extra(char* p, const RecordPlacement& at, uint64_t stored_nbytes) {
  const uint64_t extra_nbytes = zip64_extra_nbytes(at.nbytes, at.header_offset);
  if (extra_nbytes == 0) return p;
  p = put16(p, kZip64ExtraId);
  p = put16(p, extra_nbytes - kExtraFieldHeaderNbytes);
  if (size_needs_zip64(at.nbytes)) {
    p = put64(p, at.nbytes);
    p = put64(p, stored_nbytes);
  }
  if (offset_needs_zip64(at.header_offset)) p = put64(p, at.header_offset);
  return p;
}

uint64_t flags(const RecordPlacement& at) { return kFlagUtf8Name | (at.nbytes != 0 ? kFlagHasDescriptor : 0u); }

void check(const std::string& archive_name, const std::vector<RecordSpec>& records, uint64_t alignment) {
  if (archive_name.empty()) throw std::invalid_argument("the archive name is empty");
  if (alignment == 0 || alignment > kMax32) {
    throw std::invalid_argument("storage_alignment must be from 1 to 2^32 - 1, got " + std::to_string(alignment));
  }
  std::unordered_set<std::string> seen;
  seen.reserve(records.size() + 1);
  seen.insert(kSerializationIdName);
  uint64_t total_nbytes = 0;
  for (const RecordSpec& record : records) {
    if (archive_name.size() + 1 + record.name.size() > kMax16) {
      throw std::invalid_argument("record name of 64 KiB or more: " + record.name.substr(0, 60) + "...");
    }
    if (!seen.insert(record.name).second) throw std::invalid_argument("record name twice: " + record.name);
    if (record.nbytes > kMaxFileNbytes || (total_nbytes += record.nbytes) > kMaxFileNbytes) {
      throw std::invalid_argument("record sizes add up to more than a file can hold at " + record.name);
    }
  }
}

}  // namespace

ArchiveLayout::ArchiveLayout(std::string archive_name, std::vector<RecordSpec> records, uint64_t alignment)
    : archive_name_(std::move(archive_name)), alignment_(alignment) {
  check(archive_name_, records, alignment_);
  records.push_back({kSerializationIdName, kSerializationIdNbytes});
  names_.reserve(records.size());
  placements_.reserve(records.size());
  uint64_t cursor = 0;
  for (RecordSpec& record : records) {
    RecordPlacement at;
    at.header_offset = cursor;
    at.nbytes = record.nbytes;
    const uint64_t zip64_nbytes = zip64_extra_nbytes(at.nbytes, at.header_offset);
    const uint64_t name_nbytes = archive_name_.size() + 1 + record.name.size();
    const uint64_t unpadded = cursor + kLocalHeaderNbytes + name_nbytes + zip64_nbytes + kExtraFieldHeaderNbytes;
    at.payload_offset = (unpadded + alignment_ - 1) / alignment_ * alignment_;
    if (at.nbytes != 0) at.descriptor_nbytes = zip64_nbytes != 0 ? kDescriptor64Nbytes : kDescriptor32Nbytes;
    cursor = at.end_offset();
    if (cursor > kMaxFileNbytes) throw std::invalid_argument("the archive is larger than a file can be");
    nbytes_behind_records_ += kCentralHeaderNbytes + name_nbytes + zip64_nbytes;
    names_.push_back(std::move(record.name));
    placements_.push_back(at);
  }
  if (nbytes_behind_records_ >= kMax32) throw std::length_error("central directory of 4 GiB or more: too many records");
  nbytes_behind_records_ += kZip64EndNbytes + kZip64LocatorNbytes + kEndNbytes;
}

void ArchiveLayout::write_header(size_t record, char* destination) const {
  const RecordPlacement& at = placements_[record];
  const std::string& name = names_[record];
  const uint64_t zip64_nbytes = zip64_extra_nbytes(at.nbytes, at.header_offset);
  const uint64_t name_nbytes = archive_name_.size() + 1 + name.size();
  const uint64_t padding_nbytes =
      at.header_nbytes() - kLocalHeaderNbytes - name_nbytes - zip64_nbytes - kExtraFieldHeaderNbytes;
  char* p = destination;
  p = put32(p, kLocalHeaderSignature);
  p = put16(p, 0);  // version needed
  p = put16(p, flags(at));
  p = put16(p, 0);  // method: stored
  p = put32(p, 0);  // time, date
  p = put32(p, 0);  // CRC and sizes are in the descriptor
  p = put64(p, 0);
  p = put16(p, name_nbytes);
  p = put16(p, zip64_nbytes + kExtraFieldHeaderNbytes + padding_nbytes);  // cut to 16 bits, as torch
  p = static_cast<char*>(std::memcpy(p, archive_name_.data(), archive_name_.size())) + archive_name_.size();
  *p++ = '/';
  p = static_cast<char*>(std::memcpy(p, name.data(), name.size())) + name.size();
  p = put_zip64_extra(p, at, 0);
  *p++ = 'F';
  *p++ = 'B';
  p = put16(p, padding_nbytes);  // cut to 16 bits, as torch
  std::memset(p, 'Z', padding_nbytes);
}

void ArchiveLayout::write_descriptor(size_t record, uint32_t crc, char* destination) const {
  const RecordPlacement& at = placements_[record];
  if (at.descriptor_nbytes == 0) return;
  char* p = put32(destination, kDescriptorSignature);
  p = put32(p, crc);
  if (at.descriptor_nbytes == kDescriptor64Nbytes) {
    p = put64(p, at.nbytes);
    put64(p, at.nbytes);
  } else {
    p = put32(p, at.nbytes);
    put32(p, at.nbytes);
  }
}

void ArchiveLayout::write_directory(const std::vector<uint32_t>& crcs, char* destination) const {
  if (crcs.size() != placements_.size()) throw std::invalid_argument("one CRC a record");
  char* p = destination;
  for (size_t record = 0; record < placements_.size(); ++record) {
    const RecordPlacement& at = placements_[record];
    const std::string& name = names_[record];
    p = put32(p, kCentralHeaderSignature);
    p = put32(p, 0);  // version made by, version needed
    p = put16(p, flags(at));
    p = put16(p, 0);
    p = put32(p, 0);
    p = put32(p, crcs[record]);
    p = put32(p, std::min(at.nbytes, kMax32));
    p = put32(p, std::min(at.nbytes, kMax32));
    p = put16(p, archive_name_.size() + 1 + name.size());
    p = put16(p, zip64_extra_nbytes(at.nbytes, at.header_offset));
    p = put16(p, 0);  // comment
    p = put32(p, 0);  // disk, internal attributes
    p = put32(p, 0);  // external attributes
    p = put32(p, std::min(at.header_offset, kMax32));
    p = static_cast<char*>(std::memcpy(p, archive_name_.data(), archive_name_.size())) + archive_name_.size();
    *p++ = '/';
    p = static_cast<char*>(std::memcpy(p, name.data(), name.size())) + name.size();
    p = put_zip64_extra(p, at, at.nbytes);
  }
  const uint64_t entries = placements_.size();
  const uint64_t entries_nbytes = static_cast<uint64_t>(p - destination);
  p = put32(p, kZip64EndSignature);
  p = put64(p, kZip64EndNbytes - 12);
  p = put16(p, 0x031e);  // version made by
  p = put16(p, 0x002d);  // version needed: zip64
  p = put64(p, 0);       // disks
  p = put64(p, entries);
  p = put64(p, entries);
  p = put64(p, entries_nbytes);
  p = put64(p, directory_offset());
  p = put32(p, kZip64LocatorSignature);
  p = put32(p, 0);
  p = put64(p, directory_offset() + entries_nbytes);
  p = put32(p, 1);
  p = put32(p, kEndSignature);
  p = put32(p, 0);
  p = put16(p, std::min(entries, kMax16));
  p = put16(p, std::min(entries, kMax16));
  p = put32(p, std::min(entries_nbytes, kMax32));
  p = put32(p, std::min(directory_offset(), kMax32));
  put16(p, 0);
}

}  // namespace sdio
