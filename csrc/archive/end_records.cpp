#include "archive/end_records.h"

#include <algorithm>
#include <string>

#include "archive/corrupt_archive.h"
#include "archive/little_endian.h"
#include "archive/zip_structures.h"

namespace sdio {
namespace {

// Whether a field of the end record agrees with its zip64 counterpart: it is the same, or the mark of not fitting.
bool agrees(uint64_t value, uint64_t zip64_value, uint64_t mark) { return value == zip64_value || value == mark; }

// Archives of several disks count from 0, or from 1 in one piece (miniz takes both).
void check_one_disk(uint32_t this_disk, uint32_t directory_disk) {
  if (this_disk != directory_disk || this_disk > 1) throw CorruptArchive("one part of a zip archive of several");
}

}  // namespace

EndRecord find_end_record(const char* tail, uint64_t tail_nbytes, uint64_t file_nbytes) {
  if (tail_nbytes < kEndNbytes) throw CorruptArchive("no zip archive: shorter than its end record");
  // The last one counts, as for torch.
  uint64_t at = tail_nbytes - kEndNbytes;
  while (get32(tail + at) != kEndSignature) {
    if (at-- == 0) throw CorruptArchive("no end of a zip archive: cut off, or another format");
  }
  EndRecord end;
  end.offset = file_nbytes - tail_nbytes + at;
  end.limit_offset = end.offset;
  check_one_disk(get16(tail + at + 4), get16(tail + at + 6));
  if (get16(tail + at + 8) != get16(tail + at + 10)) throw CorruptArchive("one part of a zip archive of several");
  end.directory = {get32(tail + at + 16), get32(tail + at + 12), get16(tail + at + 10)};
  if (at >= kZip64LocatorNbytes && get32(tail + at - kZip64LocatorNbytes) == kZip64LocatorSignature) {
    const uint64_t locator_offset = end.offset - kZip64LocatorNbytes;
    const uint64_t zip64_offset = get64(tail + at - kZip64LocatorNbytes + 8);
    if (locator_offset < kZip64EndNbytes || zip64_offset > locator_offset - kZip64EndNbytes) {
      throw CorruptArchive("the zip64 locator points to offset " + std::to_string(zip64_offset) + ", behind itself");
    }
    end.zip64_offset = zip64_offset;
    end.limit_offset = zip64_offset;
  }
  return end;
}

DirectoryPlacement directory_placement(const EndRecord& end, const char* zip64) {
  DirectoryPlacement directory = end.directory;
  if (end.zip64_offset) {
    if (get32(zip64) != kZip64EndSignature) throw CorruptArchive("no zip64 end record where the locator points");
    check_one_disk(get32(zip64 + 16), get32(zip64 + 20));
    directory = {get64(zip64 + 48), get64(zip64 + 40), get64(zip64 + 32)};
    if (get64(zip64 + 24) != directory.num_records ||
        !agrees(end.directory.num_records, directory.num_records, kMax16) ||
        !agrees(end.directory.nbytes, directory.nbytes, kMax32) ||
        !agrees(end.directory.offset, directory.offset, kMax32)) {
      throw CorruptArchive("the end records contradict each other");
    }
  }
  if (directory.nbytes > end.limit_offset || directory.offset > end.limit_offset - directory.nbytes) {
    throw CorruptArchive("the central directory (" + std::to_string(directory.nbytes) + " bytes at offset " +
                         std::to_string(directory.offset) + ") does not end before its end record");
  }
  return directory;
}

}  // namespace sdio
