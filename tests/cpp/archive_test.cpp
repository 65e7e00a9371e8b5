// Layout and serialization id against values read off files that torch 2.13 wrote, and against the zip limits.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "archive/layout.h"
#include "archive/serialization_id.h"
#include "zip_builder.h"

namespace sdio {
namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;

uint64_t read_le(const std::string& bytes, size_t offset, size_t nbytes) {
  uint64_t value = 0;
  for (size_t i = 0; i < nbytes; ++i) {
    value |= static_cast<uint64_t>(static_cast<unsigned char>(bytes.at(offset + i))) << (8 * i);
  }
  return value;
}

std::string header_of(const ArchiveLayout& layout, size_t record) {
  std::string bytes(layout.placement(record).header_nbytes(), '\0');
  layout.write_header(record, &bytes[0]);
  return bytes;
}

std::string descriptor_of(const ArchiveLayout& layout, size_t record, uint32_t crc) {
  std::string bytes(layout.placement(record).descriptor_nbytes, '\0');
  layout.write_descriptor(record, crc, &bytes[0]);
  return bytes;
}

// torch.save([torch.zeros(0), torch.ones(1, dtype=torch.uint8)], "x.pt")
std::vector<RecordSpec> two_tensor_records() {
  return {{"data.pkl", 223}, {".format_version", 1}, {".storage_alignment", 2}, {"byteorder", 6}, {"data/0", 0},
          {"data/1", 1},     {"version", 2}};
}

TEST(ArchiveLayout, PutsRecordsWhereTorchDoes) {
  const ArchiveLayout layout("x", two_tensor_records(), 64);
  const std::vector<uint64_t> header_offsets = {0, 303, 401, 530, 598, 640, 721, 786};
  ASSERT_EQ(layout.num_records(), header_offsets.size());
  for (size_t record = 0; record < header_offsets.size(); ++record) {
    EXPECT_EQ(layout.placement(record).header_offset, header_offsets[record]) << layout.name(record);
    EXPECT_EQ(layout.placement(record).payload_offset % 64, 0u) << layout.name(record);
  }
  EXPECT_EQ(layout.placement(4).descriptor_nbytes, 0u) << "an empty record has no descriptor";
}

TEST(ArchiveLayout, WritesTheHeaderThatTorchWrites) {
  const ArchiveLayout layout("x", two_tensor_records(), 64);
  const std::string empty_record("PK\x03\x04\0\0\0\x08\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x08\0\x04\0x/data/0FB\0\0",
                                 42);
  EXPECT_EQ(header_of(layout, 4), empty_record);
  const std::string one_byte("PK\x03\x04\0\0\x08\x08\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x08\0\x1a\0x/data/1FB\x16\0",
                             42);
  EXPECT_EQ(header_of(layout, 5), one_byte + std::string(22, 'Z'));
  EXPECT_EQ(descriptor_of(layout, 5, 0xa505df1b), std::string("PK\x07\x08\x1b\xdf\x05\xa5\x01\0\0\0\x01\0\0\0", 16));
}

TEST(ArchiveLayout, DirectoryEndsWithRecordsThatPointBack) {
  const ArchiveLayout layout("x", two_tensor_records(), 64);
  const std::string directory = directory_of(layout, std::vector<uint32_t>(8, 7));
  const size_t end = directory.size() - 22, locator = end - 20, zip64_end = locator - 56;
  EXPECT_EQ(directory.substr(end, 4), "PK\x05\x06");
  EXPECT_EQ(read_le(directory, end + 10, 2), 8u);
  EXPECT_EQ(read_le(directory, end + 12, 4), zip64_end);
  EXPECT_EQ(read_le(directory, end + 16, 4), layout.directory_offset());
  EXPECT_EQ(directory.substr(locator, 4), "PK\x06\x07");
  EXPECT_EQ(read_le(directory, locator + 8, 8), layout.directory_offset() + zip64_end);
  EXPECT_EQ(directory.substr(zip64_end, 4), "PK\x06\x06");
  EXPECT_EQ(read_le(directory, zip64_end + 32, 8), 8u);
  EXPECT_EQ(read_le(directory, zip64_end + 48, 8), layout.directory_offset());
}

TEST(ArchiveLayout, RecordOfFourGiBHasZip64SizesWithTheStoredOneZeroInItsHeader) {
  const ArchiveLayout layout("x", {{"data/0", 4 * kGiB + 5}, {"data/1", 3}}, 64);
  const std::string header = header_of(layout, 0);
  const size_t extra = 30 + std::strlen("x/data/0");
  EXPECT_EQ(read_le(header, extra, 2), 1u);
  EXPECT_EQ(read_le(header, extra + 2, 2), 16u);
  EXPECT_EQ(read_le(header, extra + 4, 8), 4 * kGiB + 5);
  EXPECT_EQ(read_le(header, extra + 12, 8), 0u) << "miniz does not know it yet";
  EXPECT_EQ(layout.placement(0).descriptor_nbytes, 24u);
  EXPECT_EQ(read_le(descriptor_of(layout, 0, 1), 16, 8), 4 * kGiB + 5);
}

TEST(ArchiveLayout, RecordPastFourGiBHasItsOffsetInTheExtraField) {
  const ArchiveLayout layout("x", {{"data/0", 4 * kGiB + 5}, {"data/1", 3}}, 64);
  const std::string header = header_of(layout, 1);
  const size_t extra = 30 + std::strlen("x/data/1");
  EXPECT_EQ(read_le(header, extra + 2, 2), 8u);
  EXPECT_EQ(read_le(header, extra + 4, 8), layout.placement(1).header_offset);
  EXPECT_EQ(layout.placement(1).descriptor_nbytes, 24u) << "small, but its header has a zip64 field";
  EXPECT_EQ(layout.placement(1).payload_offset % 64, 0u);
}

TEST(ArchiveLayout, TheLastSizeWithoutZip64IsOneBelowTheMarker) {
  const uint64_t marker = 0xffffffff;
  EXPECT_EQ(ArchiveLayout("x", {{"a", marker - 1}}, 64).placement(0).descriptor_nbytes, 16u);
  EXPECT_EQ(ArchiveLayout("x", {{"a", marker}}, 64).placement(0).descriptor_nbytes, 24u);
}

TEST(ArchiveLayout, ManyRecordsSaturateTheEntryCount) {
  std::vector<RecordSpec> records;
  for (int i = 0; i < 70000; ++i) records.push_back({"data/" + std::to_string(i), 8});
  const ArchiveLayout layout("x", records, 64);
  const std::string directory = directory_of(layout, std::vector<uint32_t>(layout.num_records(), 0));
  EXPECT_EQ(read_le(directory, directory.size() - 22 + 10, 2), 0xffffu);
  EXPECT_EQ(read_le(directory, directory.size() - 98 + 32, 8), 70001u);
}

TEST(ArchiveLayout, HugeAlignmentIsCutTo16BitsInTheHeaderAsTorchDoes) {
  const ArchiveLayout layout("x", {{"a", 1}}, 100000);
  const std::string header = header_of(layout, 0);
  EXPECT_EQ(header.size(), 100000u);
  EXPECT_EQ(read_le(header, 28, 2), (100000u - 33) & 0xffff);
  EXPECT_EQ(header.back(), 'Z');
}

TEST(ArchiveLayout, FindsTheRecordAtAnyOffset) {
  const ArchiveLayout layout("x", two_tensor_records(), 64);
  for (uint64_t offset = 0; offset < layout.file_nbytes(); ++offset) {
    const size_t record = layout.record_at(offset);
    if (record == layout.num_records()) {
      EXPECT_GE(offset, layout.directory_offset());
    } else {
      EXPECT_GE(offset, layout.placement(record).header_offset);
      EXPECT_LT(offset, layout.placement(record).end_offset());
    }
  }
}

TEST(ArchiveLayout, RefusesWhatTorchCouldNotWrite) {
  EXPECT_THROW(ArchiveLayout("", {{"a", 1}}, 64), std::invalid_argument);
  EXPECT_THROW(ArchiveLayout("x", {{"a", 1}}, 0), std::invalid_argument);
  EXPECT_THROW(ArchiveLayout("x", {{"a", 1}, {"a", 1}}, 64), std::invalid_argument);
  EXPECT_THROW(ArchiveLayout("x", {{std::string(70000, 'n'), 1}}, 64), std::invalid_argument);
  EXPECT_THROW(ArchiveLayout("x", {{"a", ~uint64_t{0}}, {"b", 2}}, 64), std::invalid_argument);
  EXPECT_THROW(ArchiveLayout("x", {{"a", uint64_t{1} << 62}, {"b", uint64_t{1} << 62}}, 64), std::invalid_argument);
}

TEST(SerializationId, EqualsTorchs) {
  // torch.save([torch.zeros(0), torch.ones(1, dtype=torch.uint8)], "x.pt"): the id in the file and the CRCs it is made
  // of.
  CrcFold fold;
  for (const uint32_t crc : {0x7d177c15u, 0x83dcefb7u, 0xe971773fu, 0x19e33d85u, 0xa505df1bu, 0x55679ed1u}) {
    fold.fold_descriptor(crc);
  }
  std::vector<std::string> names;
  for (const RecordSpec& record : two_tensor_records()) names.push_back(record.name);
  EXPECT_EQ(serialization_id(record_names_hash(names, names.size()), fold.value()),
            "0561108523619670529405350716637164039574");
}

TEST(SerializationId, FoldsAPayloadThatStartsLikeADescriptor) {
  const unsigned char like_descriptor[8] = {'P', 'K', 7, 8, 0x15, 0x7c, 0x17, 0x7d};
  CrcFold from_payload, from_descriptor;
  from_payload.fold_write_start(like_descriptor);
  from_descriptor.fold_descriptor(0x7d177c15);
  EXPECT_EQ(from_payload.value(), from_descriptor.value());
  const unsigned char other[8] = {'P', 'K', 7, 9, 1, 2, 3, 4};
  CrcFold untouched;
  untouched.fold_write_start(other);
  EXPECT_EQ(untouched.value(), 0u);
}

}  // namespace
}  // namespace sdio
