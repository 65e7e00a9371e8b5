#include "archive/directory.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <utility>

#include "archive/corrupt_archive.h"
#include "archive/little_endian.h"
#include "archive/zip_structures.h"

namespace sdio {
namespace {

// A deflate stream repeats at most 258 bytes with 2 bits.
constexpr uint64_t kMaxDeflateRatio = 1032;

// The 8-byte values of a zip64 field, taken in order by the fields that hold the mark of not fitting.
class Zip64Values {
 public:
  // Finds the field among the `nbytes` of extra fields at `extra`.
  Zip64Values(const char* extra, size_t nbytes) {
    size_t at = 0;
    while (nbytes - at >= kExtraFieldHeaderNbytes) {
      const size_t begin = at + kExtraFieldHeaderNbytes;
      // Padding fields may overstate their length.
      const size_t field_nbytes = std::min<size_t>(get16(extra + at + 2), nbytes - begin);
      if (get16(extra + at) == kZip64ExtraId) {
        next_ = extra + begin;
        left_ = field_nbytes;
        found_ = true;
        return;
      }
      at = begin + field_nbytes;
    }
  }

  // Replaces `value` if it is the mark. False where the field has no value for it.
  bool resolve(uint64_t& value) {
    if (value != kMax32 || !found_) return true;  // without the field it is a size like others
    if (left_ < 8) return false;
    value = get64(next_);
    next_ += 8;
    left_ -= 8;
    return true;
  }

 private:
  const char* next_ = nullptr;
  size_t left_ = 0;
  bool found_ = false;
};

}  // namespace

uint64_t DirectoryRecord::min_payload_offset() const {
  return has_header ? header_offset + kLocalHeaderNbytes + name_nbytes : header_offset;
}

uint64_t DirectoryRecord::max_payload_offset() const {
  return has_header ? std::min(limit_offset - stored_nbytes, min_payload_offset() + kMax16) : header_offset;
}

Directory::Directory(std::string bytes, const DirectoryPlacement& placement) : bytes_(std::move(bytes)) {
  if (bytes_.size() > kMax32)
    throw CorruptArchive("a central directory of 4 GiB or more, which torch cannot read either");
  if (placement.num_records > bytes_.size() / kCentralHeaderNbytes) {
    throw CorruptArchive("the end record counts " + std::to_string(placement.num_records) + " records in " +
                         std::to_string(bytes_.size()) + " bytes of directory");
  }
  records_.reserve(placement.num_records);
  size_t at = 0;
  while (records_.size() < placement.num_records) parse_record(at, placement.offset);
  if (at != bytes_.size() && (bytes_.size() - at < 4 || get32(&bytes_[at]) != kDigitalSignatureSignature)) {
    throw CorruptArchive("the central directory goes on after its " + std::to_string(records_.size()) + " records");
  }
  check_names();
  set_limits(placement.offset);
}

Directory::Directory(const std::vector<PayloadRange>& payloads, uint64_t file_nbytes) {
  records_.reserve(payloads.size());
  for (const PayloadRange& payload : payloads) {
    DirectoryRecord record;
    record.header_offset = payload.offset;
    record.nbytes = record.stored_nbytes = payload.nbytes;
    record.has_header = false;
    record.alignment = payload.alignment;
    records_.push_back(record);
  }
  set_limits(file_nbytes);
}

void Directory::parse_record(size_t& at, uint64_t directory_offset) {
  const size_t index = records_.size();
  const char* const header = bytes_.data() + at;
  const auto where = [&] { return " in the central directory at offset " + std::to_string(directory_offset + at); };
  if (bytes_.size() - at < kCentralHeaderNbytes || get32(header) != kCentralHeaderSignature) {
    throw CorruptArchive("no header of record " + std::to_string(index) + where());
  }
  const size_t name_nbytes = get16(header + 28);
  const size_t extra_nbytes = get16(header + 30);
  const size_t header_nbytes = kCentralHeaderNbytes + name_nbytes + extra_nbytes + get16(header + 32);
  if (header_nbytes > bytes_.size() - at) {
    throw CorruptArchive("the header of record " + std::to_string(index) + " is cut off" + where());
  }
  DirectoryRecord record;
  record.name_offset = static_cast<uint32_t>(at + kCentralHeaderNbytes);
  record.name_nbytes = static_cast<uint16_t>(name_nbytes);
  record.crc32 = get32(header + 16);
  record.stored_nbytes = get32(header + 20);
  record.nbytes = get32(header + 24);
  record.header_offset = get32(header + 42);
  const uint16_t method = get16(header + 10);
  record.compressed = method == kMethodDeflate;
  records_.push_back(record);
  DirectoryRecord& added = records_.back();
  Zip64Values zip64(header + kCentralHeaderNbytes + name_nbytes, extra_nbytes);
  if (!zip64.resolve(added.nbytes) || !zip64.resolve(added.stored_nbytes) || !zip64.resolve(added.header_offset)) {
    fail(index, "its zip64 field is cut off");
  }
  if ((get16(header + 8) & kFlagEncrypted) != 0) fail(index, "is encrypted, and torch.load cannot read it either");
  if (method != kMethodStored && method != kMethodDeflate) {
    fail(index, "is compressed by method " + std::to_string(method) + ", only deflate can be read");
  }
  if (get16(header + 34) > 1) fail(index, "lies in another part of an archive of several");
  if (method == kMethodStored && added.nbytes != added.stored_nbytes) {
    fail(index, "is not compressed, but has " + std::to_string(added.stored_nbytes) + " bytes in the file for " +
                    std::to_string(added.nbytes));
  }
  if (added.compressed && added.nbytes / kMaxDeflateRatio > added.stored_nbytes) {
    fail(index, "claims " + std::to_string(added.nbytes) + " bytes from " + std::to_string(added.stored_nbytes) +
                    " compressed ones, more than deflate can hold");
  }
  at += header_nbytes;
}

// Open addressing: 8 bytes a record, a fraction of the directory's own.
void Directory::check_names() const {
  size_t num_slots = 16;
  while (num_slots < 2 * records_.size()) num_slots *= 2;
  std::vector<uint32_t> slots(num_slots, 0);  // record + 1
  for (size_t record = 0; record < records_.size(); ++record) {
    size_t slot = std::hash<std::string_view>()(name(record)) & (num_slots - 1);
    for (; slots[slot] != 0; slot = (slot + 1) & (num_slots - 1)) {
      if (name(slots[slot] - 1) == name(record)) fail(record, "two records have this name");
    }
    slots[slot] = static_cast<uint32_t>(record + 1);
  }
}

void Directory::set_limits(uint64_t directory_offset) {
  std::vector<uint32_t> order(records_.size());
  std::iota(order.begin(), order.end(), 0u);
  const auto before = [&](uint32_t a, uint32_t b) {
    if (records_[a].header_offset != records_[b].header_offset) {
      return records_[a].header_offset < records_[b].header_offset;
    }
    return records_[a].stored_nbytes < records_[b].stored_nbytes;  // of payloads without headers one may be empty
  };
  if (!std::is_sorted(order.begin(), order.end(), before)) std::sort(order.begin(), order.end(), before);
  uint64_t limit_offset = directory_offset;
  for (size_t i = order.size(); i-- > 0;) {
    DirectoryRecord& record = records_[order[i]];
    record.limit_offset = limit_offset;
    const uint64_t least_nbytes = record.min_payload_offset() - record.header_offset;
    if (record.header_offset > limit_offset || limit_offset - record.header_offset < least_nbytes ||
        limit_offset - record.header_offset - least_nbytes < record.stored_nbytes) {
      fail(order[i], std::to_string(record.stored_nbytes) + " bytes at offset " + std::to_string(record.header_offset) +
                         " reach past offset " + std::to_string(limit_offset) + ", where " +
                         (i + 1 < order.size() ? "the next record begins"
                          : record.has_header  ? "the central directory begins"
                                               : "the file ends"));
    }
    limit_offset = record.header_offset;
  }
}

std::string_view Directory::archive_name() const {
  if (records_.empty()) return {};
  const std::string_view first = name(0);
  const size_t slash = first.find('/');
  return slash == std::string_view::npos ? std::string_view() : first.substr(0, slash);
}

uint64_t Directory::payload_offset(size_t record, const char* header) const {
  const DirectoryRecord& at = records_[record];
  if (!at.has_header) return at.header_offset;
  if (get32(header) != kLocalHeaderSignature) {
    fail(record, "no local header at offset " + std::to_string(at.header_offset));
  }
  if (get16(header + 26) != at.name_nbytes ||
      std::memcmp(header + kLocalHeaderNbytes, name(record).data(), at.name_nbytes) != 0) {
    fail(record, "its local header has another name than the central directory");
  }
  const uint16_t flags = get16(header + 6);
  const uint16_t method = get16(header + 8);
  const uint64_t stored_nbytes = get32(header + 18);
  const uint64_t nbytes = get32(header + 22);
  // Sizes may be in a zip64 field, or after the payload.
  const auto agrees = [&](uint64_t local, uint64_t central) {
    return local == central || local == kMax32 || ((flags & kFlagHasDescriptor) != 0 && local == 0);
  };
  if (method != (at.compressed ? kMethodDeflate : kMethodStored) || !agrees(stored_nbytes, at.stored_nbytes) ||
      !agrees(nbytes, at.nbytes)) {
    fail(record, "its local header contradicts the central directory");
  }
  const uint64_t payload_offset = at.min_payload_offset() + get16(header + 28);
  if (payload_offset > at.max_payload_offset()) {
    fail(record,
         "its payload reaches past offset " + std::to_string(at.limit_offset) + ", where the next structure begins");
  }
  return payload_offset;
}

void Directory::fail(size_t record, const std::string& problem) const { throw CorruptArchive(name(record), problem); }

}  // namespace sdio
