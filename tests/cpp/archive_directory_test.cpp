// The directory against archives that torch and Python wrote, and against archives whose fields lie.
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "archive/corrupt_archive.h"
#include "archive/directory.h"
#include "archive/end_records.h"
#include "archive/layout.h"
#include "zip_builder.h"

namespace sdio {
namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;

// What the pipeline does with a file, on bytes: [0, tail_offset) is not there.
Directory parse_tail(const std::string& tail, uint64_t file_nbytes) {
  const uint64_t tail_offset = file_nbytes - tail.size();
  const EndRecord end = find_end_record(tail.data(), tail.size(), file_nbytes);
  const char* zip64 = end.zip64_offset ? &tail.at(*end.zip64_offset - tail_offset) : nullptr;
  const DirectoryPlacement placement = directory_placement(end, zip64);
  return Directory(tail.substr(placement.offset - tail_offset, placement.nbytes), placement);
}

Directory parse(const std::string& file) { return parse_tail(file, file.size()); }

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const CorruptArchive& e) {
    return e.what();
  }
  return "";
}

TEST(Directory, ReadsBackWhatTheLayoutPlaced) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 50; ++round) {
    std::vector<RecordSpec> specs;
    const size_t num_records = random() % 40;
    for (size_t i = 0; i < num_records; ++i) {
      specs.push_back({"data/" + std::to_string(i), random() % 3 == 0 ? random() % (9 * kGiB) : random() % 1000});
    }
    const uint64_t alignment = std::vector<uint64_t>{1, 64, 4096, 65536}[random() % 4];
    const ArchiveLayout layout("model", specs, alignment);
    std::vector<uint32_t> crcs(layout.num_records());
    for (uint32_t& crc : crcs) crc = static_cast<uint32_t>(random());
    const Directory directory = parse_tail(directory_of(layout, crcs), layout.file_nbytes());
    ASSERT_EQ(directory.num_records(), layout.num_records());
    EXPECT_EQ(directory.archive_name(), "model");
    for (size_t i = 0; i < layout.num_records(); ++i) {
      const RecordPlacement& at = layout.placement(i);
      EXPECT_EQ(directory.name(i), "model/" + layout.name(i));
      EXPECT_EQ(directory[i].header_offset, at.header_offset);
      EXPECT_EQ(directory[i].limit_offset, at.end_offset());
      EXPECT_EQ(directory[i].nbytes, at.nbytes);
      EXPECT_EQ(directory[i].stored_nbytes, at.nbytes);
      EXPECT_EQ(directory[i].crc32, crcs[i]);
      EXPECT_FALSE(directory[i].compressed);
      std::string header(at.header_nbytes(), '\0');
      layout.write_header(i, &header[0]);
      EXPECT_EQ(directory.payload_offset(i, header.data()), at.payload_offset) << "alignment " << alignment;
    }
  }
}

TEST(Directory, ReadsWhatPythonsZipfileWrote) {
  // A folder, a stored record, a deflated one, and one with sizes in a zip64 field of the local header alone.
  const char hex[] =
      "504b030414000000000000002100000000000000000000000000020000006d2f504b03041400000000000000210086a610360500"
      "0000050000000a0000006d2f646174612e706b6c68656c6c6f504b0304140000000800000021007dbad747060000003200000008"
      "0000006d2f646174612f304b4c24150000504b03042d00000000000000210067ba8eebffffffffffffffff080014006d2f646174"
      "612f31010010000300000000000000030000000000000078797a504b010214031400000000000000210000000000000000000000"
      "00000200000000000000000000008001000000006d2f504b010214031400000000000000210086a6103605000000050000000a00"
      "000000000000000000008001200000006d2f646174612e706b6c504b01021403140000000800000021007dbad747060000003200"
      "000008000000000000000000000080014d0000006d2f646174612f30504b01022d032d00000000000000210067ba8eeb03000000"
      "030000000800000000000000000000008001790000006d2f646174612f31504b05060000000004000400d4000000b60000000000";
  std::string file;
  for (size_t i = 0; i + 1 < sizeof hex - 1; i += 2) {
    file += static_cast<char>(std::stoi(std::string(hex + i, 2), nullptr, 16));
  }
  ASSERT_EQ(file.size(), 416u);
  const Directory directory = parse(file);
  ASSERT_EQ(directory.num_records(), 4u);
  EXPECT_EQ(directory.archive_name(), "m");
  const std::vector<std::string> names = {"m/", "m/data.pkl", "m/data/0", "m/data/1"};
  const std::vector<std::string> stored = {"", "hello", std::string("\x4b\x4c\x24\x15\0\0", 6), "xyz"};
  for (size_t i = 0; i < names.size(); ++i) {
    EXPECT_EQ(directory.name(i), names[i]);
    EXPECT_EQ(directory[i].compressed, i == 2);
    EXPECT_EQ(directory[i].nbytes, i == 2 ? 50u : stored[i].size());
    const uint64_t offset = directory.payload_offset(i, &file[directory[i].header_offset]);
    EXPECT_EQ(file.substr(offset, directory[i].stored_nbytes), stored[i]);
  }
}

ZipBuilder three_records(bool zip64 = false, bool descriptor = false) {
  ZipBuilder zip;
  for (int i = 0; i < 3; ++i) {
    ZipRecord record = {"m/data/" + std::to_string(i), std::string(100, static_cast<char>('a' + i))};
    record.zip64 = zip64;
    record.descriptor = descriptor;
    zip.add(record);
  }
  return zip;
}

TEST(Directory, TakesEachWayToWriteSizes) {
  for (const bool zip64 : {false, true}) {
    for (const bool descriptor : {false, true}) {
      for (const bool zip64_end : {false, true}) {
        for (const std::string& comment : {std::string(), std::string("a comment"), std::string(65535, 'c')}) {
          ZipBuilder zip = three_records(zip64, descriptor);
          const std::string file = zip.finish(zip64_end, comment);
          const Directory directory = parse(file);
          ASSERT_EQ(directory.num_records(), 3u);
          for (size_t i = 0; i < 3; ++i) {
            EXPECT_EQ(directory[i].nbytes, 100u);
            EXPECT_EQ(directory.payload_offset(i, &file[zip.header_offset(i)]), zip.payload_offset(i));
          }
        }
      }
    }
  }
}

TEST(Directory, OfAnEmptyArchiveHasNoRecordsAndNoName) {
  const Directory directory = parse(ZipBuilder().finish());
  EXPECT_EQ(directory.num_records(), 0u);
  EXPECT_EQ(directory.archive_name(), "");
}

TEST(Directory, RecordsMayStandInAnyOrder) {
  ZipBuilder zip = three_records();
  std::string file = zip.finish();
  const uint64_t header_nbytes = zip.central_offset(1) - zip.central_offset(0);
  const std::string first = file.substr(zip.central_offset(0), header_nbytes);
  const std::string last = file.substr(zip.central_offset(2), header_nbytes);
  file.replace(zip.central_offset(0), header_nbytes, last).replace(zip.central_offset(2), header_nbytes, first);
  const Directory directory = parse(file);
  EXPECT_EQ(directory.name(0), "m/data/2");
  EXPECT_EQ(directory[0].limit_offset, zip.central_offset(0));
  EXPECT_EQ(directory[2].limit_offset, zip.header_offset(1));
}

// One lie in an otherwise sound archive: `nbytes` of `value` at an offset that depends on the archive.
struct Lie {
  const char* what;
  std::function<uint64_t(const ZipBuilder&)> offset;
  size_t nbytes;
  uint64_t value;
  const char* message;
};

uint64_t central(const ZipBuilder& zip, size_t record, uint64_t field) { return zip.central_offset(record) + field; }

// Of the zip64 field of the central header, after the name.
uint64_t central_zip64(const ZipBuilder& zip, uint64_t field) { return central(zip, 1, 46 + 8 + field); }

const uint64_t kHuge = std::numeric_limits<uint64_t>::max();

const std::vector<Lie>& lies() {
  static const std::vector<Lie> all = {
      {"end signature", [](const auto& zip) { return zip.end_offset(); }, 1, 'Q', "no end of a zip archive"},
      {"disk", [](const auto& zip) { return zip.end_offset() + 4; }, 2, 7, "one part of a zip archive of several"},
      {"records here", [](const auto& zip) { return zip.end_offset() + 8; }, 2, 2, "one part of a zip archive"},
      {"end count", [](const auto& zip) { return zip.end_offset() + 8; }, 4, 0x00040004, "contradict each other"},
      {"end size", [](const auto& zip) { return zip.end_offset() + 12; }, 4, 5, "contradict each other"},
      {"end offset", [](const auto& zip) { return zip.end_offset() + 16; }, 4, 5, "contradict each other"},
      {"locator", [](const auto& zip) { return zip.end_offset() - 12; }, 8, kHuge, "behind itself"},
      {"locator by one", [](const auto& zip) { return zip.end_offset() - 12; }, 1, 1, "no zip64 end record"},
      {"zip64 signature", [](const auto& zip) { return zip.zip64_end_offset(); }, 1, 'Q', "no zip64 end record"},
      {"zip64 count", [](const auto& zip) { return zip.zip64_end_offset() + 32; }, 8, kHuge, "contradict each other"},
      {"zip64 size", [](const auto& zip) { return zip.zip64_end_offset() + 40; }, 8, kHuge, "contradict each other"},
      {"zip64 offset", [](const auto& zip) { return zip.zip64_end_offset() + 48; }, 8, kHuge, "contradict each other"},
      {"central signature", [](const auto& zip) { return central(zip, 1, 0); }, 1, 'Q', "no header of record 1"},
      {"flags", [](const auto& zip) { return central(zip, 1, 8); }, 1, 1, "'m/data/1': is encrypted"},
      {"method", [](const auto& zip) { return central(zip, 1, 10); }, 2, 12, "'m/data/1': is compressed by method 12"},
      {"stored size", [](const auto& zip) { return central(zip, 1, 20); }, 4, 99, "'m/data/1': is not compressed, but"},
      {"size", [](const auto& zip) { return central(zip, 1, 24); }, 4, 101, "'m/data/1': is not compressed, but"},
      {"name length", [](const auto& zip) { return central(zip, 1, 28); }, 2, 0xffff, "header of record 1 is cut off"},
      {"extra length", [](const auto& zip) { return central(zip, 2, 30); }, 2, 0xffff, "header of record 2 is cut off"},
      {"comment length", [](const auto& zip) { return central(zip, 2, 32); }, 2, 9, "header of record 2 is cut off"},
      {"longer name", [](const auto& zip) { return central(zip, 1, 28); }, 2, 9, "no header of record 2"},
      {"disk of record", [](const auto& zip) { return central(zip, 1, 34); }, 2, 2, "'m/data/1': lies in another part"},
      {"twice", [](const auto& zip) { return central(zip, 1, 46 + 7); }, 1, '0', "'m/data/0': two records"},
      {"onto another", [](const auto& zip) { return central(zip, 1, 42); }, 4, 0, "reach past offset"},
      {"over the next", [](const auto& zip) { return central(zip, 1, 42); }, 4, 138 + 1, "the next record begins"},
      {"over the directory", [](const auto& zip) { return central(zip, 2, 42); }, 4, 277, "central directory begins"},
      {"past the end", [](const auto& zip) { return central(zip, 2, 42); }, 4, 0xfffffffe, "central directory begins"},
  };
  return all;
}

TEST(Directory, EveryLieInItIsSeen) {
  for (const Lie& lie : lies()) {
    ZipBuilder zip = three_records();
    std::string file = zip.finish();
    ASSERT_EQ(zip.header_offset(1), 138u);
    for (size_t i = 0; i < lie.nbytes; ++i) file.at(lie.offset(zip) + i) = static_cast<char>(lie.value >> (8 * i));
    const std::string error = error_of([&] { parse(file); });
    EXPECT_NE(error.find(lie.message), std::string::npos) << lie.what << ": " << error;
  }
}

TEST(Directory, EveryLieInAZip64FieldIsSeen) {
  const std::vector<Lie> zip64_lies = {
      {"field cut off", [](const auto& zip) { return central_zip64(zip, 2); }, 2, 20, "zip64 field is cut off"},
      {"field of nothing", [](const auto& zip) { return central_zip64(zip, 2); }, 2, 0, "zip64 field is cut off"},
      {"field too long", [](const auto& zip) { return central_zip64(zip, 2); }, 2, 0xffff, ""},
      {"no field", [](const auto& zip) { return central_zip64(zip, 0); }, 2, 2, "reach past offset"},
      {"2^64 bytes", [](const auto& zip) { return central_zip64(zip, 4); }, 8, kHuge, "is not compressed, but"},
      {"2^63 stored", [](const auto& zip) { return central_zip64(zip, 12); }, 8, kHuge / 2, "is not compressed, but"},
      {"2^64 offset", [](const auto& zip) { return central_zip64(zip, 20); }, 8, kHuge, "reach past offset"},
      {"wrapping offset", [](const auto& zip) { return central_zip64(zip, 20); }, 8, kHuge - 99, "reach past offset"},
  };
  for (const Lie& lie : zip64_lies) {
    ZipBuilder zip = three_records(/*zip64=*/true);
    std::string file = zip.finish();
    for (size_t i = 0; i < lie.nbytes; ++i) file.at(lie.offset(zip) + i) = static_cast<char>(lie.value >> (8 * i));
    const std::string error = error_of([&] { parse(file); });
    EXPECT_NE(error.find(lie.message), std::string::npos) << lie.what << ": " << error;
    EXPECT_EQ(error.empty(), *lie.message == '\0') << lie.what << ": " << error;
  }
}

TEST(Directory, SizesThatWrapTogetherAreSeen) {
  ZipBuilder zip = three_records(/*zip64=*/true);
  std::string file = zip.finish();
  for (const uint64_t field : {4, 12}) {
    for (size_t i = 0; i < 8; ++i) file.at(central_zip64(zip, field) + i) = '\xff';
  }
  EXPECT_NE(error_of([&] { parse(file); }).find("'m/data/1': 18446744073709551615 bytes at offset"), std::string::npos);
}

TEST(Directory, CountsOfNoZip64RecordMayLieToo) {
  for (const uint64_t count : {0u, 1u, 2u, 4u, 0xffffu}) {
    ZipBuilder zip = three_records();
    std::string file = zip.finish(/*zip64_end=*/false);
    put16(put16(&file[zip.end_offset() + 8], count), count);
    EXPECT_NE(error_of([&] { parse(file); }), "") << count;
  }
}

TEST(Directory, BytesBeforeTheArchiveAreRefusedAsTorchDoes) {
  ZipBuilder zip = three_records();
  EXPECT_NE(error_of([&] { parse("PK\x03\x04 and other bytes" + zip.finish()); }), "");
}

TEST(Directory, ABombIsMoreThanDeflateCanHold) {
  ZipBuilder zip;
  ZipRecord record = {"m/data/0", std::string(1000, 'x'), kMethodDeflate};
  record.nbytes = 1000 * 1032;
  zip.add(record);
  EXPECT_EQ(parse(zip.finish())[0].nbytes, record.nbytes);
  ZipBuilder bomb;
  record.nbytes = 1001 * 1032;
  bomb.add(record);
  EXPECT_NE(error_of([&] { parse(bomb.finish()); }).find("more than deflate can hold"), std::string::npos);
}

TEST(Directory, EveryLieInALocalHeaderIsSeen) {
  const std::vector<Lie> local_lies = {
      {"signature", [](const auto& zip) { return zip.header_offset(1); }, 1, 'Q', "no local header"},
      {"method", [](const auto& zip) { return zip.header_offset(1) + 8; }, 2, 8, "contradicts"},
      {"stored size", [](const auto& zip) { return zip.header_offset(1) + 18; }, 4, 99, "contradicts"},
      {"size", [](const auto& zip) { return zip.header_offset(1) + 22; }, 4, 0, "contradicts"},
      {"name length", [](const auto& zip) { return zip.header_offset(1) + 26; }, 2, 7, "another name"},
      {"name", [](const auto& zip) { return zip.header_offset(1) + 30; }, 1, 'n', "another name"},
      {"extra by one", [](const auto& zip) { return zip.header_offset(1) + 28; }, 2, 1, "reaches past"},
      {"extra", [](const auto& zip) { return zip.header_offset(1) + 28; }, 2, 0xffff, "reaches past"},
  };
  for (const Lie& lie : local_lies) {
    ZipBuilder zip = three_records();
    std::string file = zip.finish();
    for (size_t i = 0; i < lie.nbytes; ++i) file.at(lie.offset(zip) + i) = static_cast<char>(lie.value >> (8 * i));
    const Directory directory = parse(file);
    const std::string error = error_of([&] { directory.payload_offset(1, &file[zip.header_offset(1)]); });
    EXPECT_NE(error.find(lie.message), std::string::npos) << lie.what << ": " << error;
    EXPECT_NE(error.find("m/data/1"), std::string::npos) << lie.what << ": " << error;
    EXPECT_EQ(directory.payload_offset(0, &file[zip.header_offset(0)]), zip.payload_offset(0));
  }
}

TEST(Directory, NoPrefixOfAnArchiveIsOne) {
  ZipBuilder zip = three_records();
  const std::string file = zip.finish();
  for (size_t nbytes = 0; nbytes < file.size(); ++nbytes) {
    EXPECT_NE(error_of([&] { parse(file.substr(0, nbytes)); }), "") << nbytes;
  }
}

TEST(Directory, AMessageHoldsNoMoreThanALineOfAName) {
  ZipBuilder zip;
  ZipRecord record = {std::string(60000, 'n'), ""};
  zip.add(record);
  zip.add(record);
  EXPECT_LT(error_of([&] { parse(zip.finish()); }).size(), 300u);
}

}  // namespace
}  // namespace sdio
