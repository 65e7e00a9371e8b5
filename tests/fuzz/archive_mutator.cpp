#include "archive_mutator.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "archive/little_endian.h"
#include "archive/zip_structures.h"

namespace sdio {
namespace {

struct Field {
  size_t offset;
  size_t nbytes;
};

struct Structure {
  uint32_t signature;
  std::vector<Field> fields;
};

const std::vector<Structure>& structures() {
  static const std::vector<Structure> all = {
      {kLocalHeaderSignature, {{0, 4}, {6, 2}, {8, 2}, {14, 4}, {18, 4}, {22, 4}, {26, 2}, {28, 2}}},
      {kCentralHeaderSignature,
       {{0, 4}, {8, 2}, {10, 2}, {16, 4}, {20, 4}, {24, 4}, {28, 2}, {30, 2}, {32, 2}, {34, 2}, {42, 4}}},
      {kZip64EndSignature, {{0, 4}, {4, 8}, {16, 4}, {20, 4}, {24, 8}, {32, 8}, {40, 8}, {48, 8}}},
      {kZip64LocatorSignature, {{0, 4}, {4, 4}, {8, 8}, {16, 4}}},
      {kEndSignature, {{0, 4}, {4, 2}, {6, 2}, {8, 2}, {10, 2}, {12, 4}, {16, 4}, {20, 2}}},
  };
  return all;
}

struct Place {
  size_t offset;
  const Structure* structure;
};

// Wherever a signature stands, also in payloads.
std::vector<Place> places_of(const std::string& archive) {
  std::vector<Place> places;
  for (size_t at = archive.find("PK"); at != std::string::npos && at + 4 <= archive.size();
       at = archive.find("PK", at + 1)) {
    for (const Structure& structure : structures()) {
      if (get32(&archive[at]) == structure.signature) places.push_back({at, &structure});
    }
  }
  return places;
}

uint64_t get(const std::string& archive, size_t offset, size_t nbytes) {
  uint64_t value = 0;
  for (size_t i = 0; i < nbytes; ++i)
    value |= static_cast<uint64_t>(static_cast<unsigned char>(archive[offset + i])) << (8 * i);
  return value;
}

void put(std::string& archive, size_t offset, size_t nbytes, uint64_t value) {
  for (size_t i = 0; i < nbytes && offset + i < archive.size(); ++i)
    archive[offset + i] = static_cast<char>(value >> (8 * i));
}

class Change {
 public:
  Change(std::string& archive, std::mt19937_64& random)
      : archive_(archive), random_(random), places_(places_of(archive)) {}

  size_t below(size_t limit) { return limit == 0 ? 0 : random_() % limit; }
  bool has_places() const { return !places_.empty(); }
  const Place& place() { return places_[below(places_.size())]; }

  // What a field may be changed to: limits, its neighbourhood, and what stands elsewhere in the file.
  uint64_t value(uint64_t old) {
    switch (below(12)) {
      case 0:
        return 0;
      case 1:
        return ~uint64_t{0};
      case 2:
        return kMax32;
      case 3:
        return kMax16;
      case 4:
        return old + 1 + below(64);
      case 5:
        return old - 1 - below(64);
      case 6:
        return archive_.size() - below(200);
      case 7:
        return places_.empty() ? random_() : place().offset;
      case 8:
        return uint64_t{1} << below(64);
      case 9:
        return ~uint64_t{0} - below(5000);
      case 10:
        return below(5000);
      default:
        return random_();
    }
  }

  void field() {
    const Place& at = place();
    const Field& field = at.structure->fields[below(at.structure->fields.size())];
    if (at.offset + field.offset + field.nbytes > archive_.size()) return;
    put(archive_, at.offset + field.offset, field.nbytes, value(get(archive_, at.offset + field.offset, field.nbytes)));
  }

  // A central header whose 32-bit fields defer to a zip64 field, put in where the name ends.
  void zip64_field() {
    const Place& at = place();
    if (at.structure->signature != kCentralHeaderSignature || at.offset + kCentralHeaderNbytes > archive_.size())
      return;
    std::string values;
    for (const size_t offset : {size_t{24}, size_t{20}, size_t{42}}) {
      if (below(3) == 0) continue;
      std::string eight(8, '\0');
      put64(&eight[0], below(2) == 0 ? value(0) : get(archive_, at.offset + offset, 4));
      put(archive_, at.offset + offset, 4, kMax32);
      values += eight;
    }
    values.resize(values.size() - std::min(values.size(), below(10) == 0 ? below(9) : 0));
    std::string extra(4, '\0');
    put16(put16(&extra[0], kZip64ExtraId), below(10) == 0 ? value(values.size()) : values.size());
    extra += values;
    const size_t name_end = at.offset + kCentralHeaderNbytes + get16(&archive_[at.offset + 28]);
    if (name_end > archive_.size()) return;
    put(archive_, at.offset + 30, 2, get16(&archive_[at.offset + 30]) + extra.size());
    archive_.insert(name_end, extra);
    grow_directory(extra.size());
  }

  // Keeps the end records true, so that what follows them is reached.
  void grow_directory(size_t nbytes) {
    for (const Place& at : places_of(archive_)) {
      const bool zip64 = at.structure->signature == kZip64EndSignature;
      const bool locator = at.structure->signature == kZip64LocatorSignature;
      if (!zip64 && !locator && at.structure->signature != kEndSignature) continue;
      const size_t offset = at.offset + (zip64 ? 40 : locator ? 8 : 12);
      const size_t width = zip64 || locator ? 8 : 4;
      if (offset + width <= archive_.size()) put(archive_, offset, width, get(archive_, offset, width) + nbytes);
    }
  }

  // One lie that all end records agree on.
  void end_records() {
    struct Fact {
      std::vector<Field> zip64, end;
    };
    static const std::vector<Fact> facts = {
        {{{24, 8}, {32, 8}}, {{8, 2}, {10, 2}}}, {{{40, 8}}, {{12, 4}}}, {{{48, 8}}, {{16, 4}}}};
    const Fact& fact = facts[below(facts.size())];
    bool decided = false;
    uint64_t lie = 0;
    for (const Place& at : places_) {
      const bool zip64 = at.structure->signature == kZip64EndSignature;
      if (!zip64 && at.structure->signature != kEndSignature) continue;
      for (const Field& field : zip64 ? fact.zip64 : fact.end) {
        if (at.offset + field.offset + field.nbytes > archive_.size()) return;
        if (!decided) lie = value(get(archive_, at.offset + field.offset, field.nbytes));
        decided = true;
        const uint64_t mark = field.nbytes == 2 ? kMax16 : kMax32;
        put(archive_, at.offset + field.offset, field.nbytes, field.nbytes == 8 ? lie : std::min(lie, mark));
      }
    }
  }

  void swap_headers() {
    const Place a = place(), b = place();
    const size_t nbytes = std::min<size_t>(kCentralHeaderNbytes, archive_.size() - std::max(a.offset, b.offset));
    for (size_t i = 0; i < nbytes; ++i) std::swap(archive_[a.offset + i], archive_[b.offset + i]);
  }

  void bits() {
    for (size_t i = 0; i <= below(8) && !archive_.empty(); ++i) {
      char& byte = archive_[below(archive_.size())];
      byte = static_cast<char>(byte ^ (1 << below(8)));
    }
  }

  void splice(const std::string& other) {
    const size_t from = below(other.size());
    const std::string piece = other.substr(from, 1 + below(300));
    const size_t at = below(archive_.size() + 1);
    if (below(2) == 0) {
      archive_.insert(at, piece);
    } else {
      archive_.replace(at, piece.size(), piece);
    }
  }

  void erase() {
    if (!archive_.empty()) archive_.erase(below(archive_.size()), 1 + below(below(2) == 0 ? 8 : 300));
  }
  void cut() { archive_.resize(below(archive_.size() + 1)); }
  void repeat() {
    const size_t at = below(archive_.size());
    archive_.insert(at, archive_.substr(at, 1 + below(200)));
  }

 private:
  std::string& archive_;
  std::mt19937_64& random_;
  const std::vector<Place> places_;
};

}  // namespace

void ArchiveMutator::change(std::string& archive, std::mt19937_64& random) const {
  Change change(archive, random);
  const size_t kind = random() % 20;
  if (change.has_places() && kind < 9) return change.field();
  if (change.has_places() && kind < 12) return change.zip64_field();
  if (change.has_places() && kind < 13) return change.end_records();
  if (change.has_places() && kind < 14) return change.swap_headers();
  if (kind < 16) return change.bits();
  if (kind < 17) return change.erase();
  if (kind < 18) return change.repeat();
  if (kind < 19 && !others_.empty()) return change.splice(others_[random() % others_.size()]);
  change.cut();
}

std::string ArchiveMutator::mutate(std::string archive, std::mt19937_64& random, size_t max_nbytes) const {
  for (size_t changes = 1 + random() % 4; changes > 0; --changes) change(archive, random);
  if (archive.size() > max_nbytes) archive.resize(max_nbytes);
  return archive;
}

}  // namespace sdio
