// Archives as bytes, sound ones and ones whose fields lie.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "archive/layout.h"
#include "archive/little_endian.h"
#include "archive/zip_structures.h"
#include "checksum/crc32.h"

namespace sdio {

inline std::string directory_of(const ArchiveLayout& layout, const std::vector<uint32_t>& crcs) {
  std::string bytes(layout.directory_nbytes(), '\0');
  layout.write_directory(crcs, &bytes[0]);
  return bytes;
}

struct ZipRecord {
  std::string name;
  std::string stored;  // its bytes in the file
  uint16_t method = kMethodStored;
  uint64_t nbytes = 0;  // uncompressed, of a compressed one
  std::string local_extra = {};
  bool descriptor = false;  // sizes follow the payload
  bool zip64 = false;       // sizes and offset in zip64 fields, needed or not
};

class ZipBuilder {
 public:
  void add(const ZipRecord& record) {
    const uint64_t nbytes = record.method == kMethodStored ? record.stored.size() : record.nbytes;
    const uint32_t crc = crc32(0, record.stored.data(), record.stored.size());
    const uint64_t flags = kFlagUtf8Name | (record.descriptor ? kFlagHasDescriptor : 0u);
    header_offsets_.push_back(file_.size());
    std::string extra = record.local_extra;
    if (record.zip64) {
      std::string values(16, '\0');
      put64(put64(&values[0], nbytes), record.stored.size());
      extra = zip64_field(values) + extra;
    }
    const bool now = !record.descriptor && !record.zip64;
    const uint64_t mark = record.zip64 ? kMax32 : 0;
    std::string header(kLocalHeaderNbytes, '\0');
    char* p = put32(&header[0], kLocalHeaderSignature);
    p = put16(put16(put16(p, 20), flags), record.method);
    p = put32(put32(p, 0), record.descriptor ? 0 : crc);
    p = put32(put32(p, now ? record.stored.size() : mark), now ? nbytes : mark);
    put16(put16(p, record.name.size()), extra.size());
    file_ += header + record.name + extra;
    payload_offsets_.push_back(file_.size());
    file_ += record.stored;
    if (record.descriptor) {
      std::string descriptor(kDescriptor32Nbytes, '\0');
      put32(put32(put32(put32(&descriptor[0], kDescriptorSignature), crc), record.stored.size()), nbytes);
      file_ += descriptor;
    }

    std::string central(kCentralHeaderNbytes, '\0');
    p = put32(&central[0], kCentralHeaderSignature);
    p = put16(put16(put16(put16(p, 20), 20), flags), record.method);
    p = put32(put32(p, 0), crc);
    p = put32(put32(p, record.zip64 ? kMax32 : record.stored.size()), record.zip64 ? kMax32 : nbytes);
    p = put16(put16(p, record.name.size()), record.zip64 ? 28 : 0);
    p = put32(put16(put16(put16(p, 0), 0), 0), 0);
    put32(p, record.zip64 ? kMax32 : header_offsets_.back());
    central_offsets_.push_back(central_.size());
    central_ += central + record.name;
    if (record.zip64) {
      std::string values(24, '\0');
      put64(put64(put64(&values[0], nbytes), record.stored.size()), header_offsets_.back());
      central_ += zip64_field(values);
    }
  }

  // The whole archive. The builder can be asked for places afterwards, and takes no more records.
  std::string finish(bool zip64_end = true, const std::string& comment = "") {
    const uint64_t directory_offset = file_.size();
    for (uint64_t& offset : central_offsets_) offset += directory_offset;
    file_ += central_;
    const uint64_t count = central_offsets_.size();
    if (zip64_end) {
      const uint64_t zip64_offset = file_.size();
      std::string end(kZip64EndNbytes + kZip64LocatorNbytes, '\0');
      char* p = put64(put32(&end[0], kZip64EndSignature), kZip64EndNbytes - 12);
      p = put64(put16(put16(p, 45), 45), 0);
      p = put64(put64(put64(put64(p, count), count), central_.size()), directory_offset);
      p = put32(put32(p, kZip64LocatorSignature), 0);
      put32(put64(p, zip64_offset), 1);
      file_ += end;
    }
    end_offset_ = file_.size();
    std::string end(kEndNbytes, '\0');
    char* p = put32(put32(&end[0], kEndSignature), 0);
    p = put16(put16(p, count), count);
    put16(put32(put32(p, central_.size()), directory_offset), comment.size());
    file_ += end + comment;
    return file_;
  }

  uint64_t header_offset(size_t record) const { return header_offsets_[record]; }
  uint64_t payload_offset(size_t record) const { return payload_offsets_[record]; }
  uint64_t central_offset(size_t record) const { return central_offsets_[record]; }
  uint64_t end_offset() const { return end_offset_; }
  uint64_t zip64_end_offset() const { return end_offset_ - kZip64LocatorNbytes - kZip64EndNbytes; }

 private:
  static std::string zip64_field(const std::string& values) {
    std::string header(4, '\0');
    put16(put16(&header[0], kZip64ExtraId), values.size());
    return header + values;
  }

  std::string file_;
  std::string central_;
  std::vector<uint64_t> header_offsets_;
  std::vector<uint64_t> payload_offsets_;
  std::vector<uint64_t> central_offsets_;
  uint64_t end_offset_ = 0;
};

}  // namespace sdio
