#include "pipeline/write/strip_writer.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <utility>

#include "checksum/crc32.h"
#include "pipeline/memory/slot_pool.h"
#include "pipeline/threads/profiled_step.h"
#include "pipeline/write/held_writes.h"
#include "pipeline/write/staged_writes.h"
#include "pipeline/write/strip_plan.h"

namespace sdio {
namespace {

// Fewer whole blocks than this are not worth a wait for the device.
constexpr uint64_t kDirectFromNbytes = 64u << 10;
// Bytes of so many are checksummed, then written while they are still in the cache.
constexpr uint64_t kCacheNbytes = 1u << 20;
constexpr uint64_t kRowsBetweenLooks = 256;

void write_bytes(PositionalSink& sink, uint64_t file_offset, const char* bytes, uint64_t nbytes) {
  const ProfiledStep step("statedict_io::write");
  sink.write(file_offset, bytes, nbytes);
}

void copy_from_device(DeviceSource& devices, const std::vector<DevicePiece>& pieces) {
  const ProfiledStep step("statedict_io::device_to_host");
  devices.copy(pieces);
}

// The result of each strip, from parts that any thread adds in any order.
class Results {
 public:
  explicit Results(size_t num_strips) : crcs_(new std::atomic<uint32_t>[num_strips]), results_(num_strips) {
    for (size_t i = 0; i < num_strips; ++i) crcs_[i] = 0;
  }

  void add_crc(size_t strip, uint32_t crc, uint64_t nbytes_after) {
    crcs_[strip].fetch_xor(crc32_shift(crc, nbytes_after));
  }

  // The `nbytes` from `strip_offset` on are at `bytes`.
  void add_first_bytes(size_t strip, uint64_t strip_offset, const char* bytes, uint64_t nbytes) {
    constexpr uint64_t kWanted = sizeof(StripResult::first_bytes);
    if (strip_offset >= kWanted) return;
    std::memcpy(results_[strip].first_bytes + strip_offset, bytes, std::min(nbytes, kWanted - strip_offset));
  }

  std::vector<StripResult> take() {
    for (size_t i = 0; i < results_.size(); ++i) results_[i].crc = crcs_[i];
    return std::move(results_);
  }

 private:
  const std::unique_ptr<std::atomic<uint32_t>[]> crcs_;
  std::vector<StripResult> results_;
};

// What the two kinds of rows are written with.
struct Shared {
  const std::vector<Strip>& strips;
  PositionalSink& direct;
  PositionalSink& buffered;
  DeviceSource* const devices;
  const StripOptions options;
  const StripPlan plan;
  Results results;
};

// Regions of long rows. Where writes go past the page cache, a region is gathered in its slot; else bytes in host
// memory are written from where they lie, and only those from devices come through the slot.
class LongRows {
 public:
  explicit LongRows(Shared& shared) : shared_(shared), gathers_(shared.direct.direct()), held_(shared.buffered) {}

  void fill(const StripRegion& region, char* slot) {
    std::vector<DevicePiece> from_device;
    for (const RowPart& part : parts_of(region)) {
      const Strip& strip = shared_.strips[part.strip];
      char* const in_slot = slot + (part.file_offset - region.file_offset);
      if (strip.on_device()) {
        from_device.push_back({strip.source, strip.source_offset + part.strip_offset, part.nbytes, in_slot});
      } else if (gathers_) {
        gather(part, strip.data + part.strip_offset, in_slot);
      }
    }
    if (from_device.empty()) return;
    copy_from_device(*shared_.devices, from_device);
    const ProfiledStep step("statedict_io::crc32");
    for (const RowPart& part : parts_of(region)) {
      if (!shared_.strips[part.strip].on_device()) continue;
      const char* const bytes = slot + (part.file_offset - region.file_offset);
      add(part, bytes, shared_.options.compute_crc32 ? crc32(0, bytes, part.nbytes) : 0);
    }
  }

  uint64_t write(const StripRegion& region, const char* slot) {
    uint64_t nbytes = 0;
    const Parts parts = parts_of(region);
    for (const RowPart& part : parts) {
      nbytes += part.nbytes;
      if (!in_slot(part)) write_in_place(part, shared_.strips[part.strip].data + part.strip_offset);
    }
    // Parts in the slot that touch each other in the file are written at once.
    for (const RowPart* part = parts.first; part != parts.last;) {
      if (!in_slot(*part)) {
        ++part;
        continue;
      }
      const uint64_t begin = part->file_offset;
      uint64_t end = begin;
      for (; part != parts.last && part->file_offset == end && in_slot(*part); ++part) end += part->nbytes;
      write_from_slot(begin, end, slot + (begin - region.file_offset));
    }
    return nbytes;
  }

  void finish() { held_.flush(); }

 private:
  struct Parts {
    const RowPart* first;
    const RowPart* last;
    const RowPart* begin() const { return first; }
    const RowPart* end() const { return last; }
  };

  Parts parts_of(const StripRegion& region) const {
    const RowPart* const first = shared_.plan.parts.data() + region.first_part;
    return {first, first + region.num_parts};
  }

  bool in_slot(const RowPart& part) const { return gathers_ || shared_.strips[part.strip].on_device(); }

  void gather(const RowPart& part, const char* source, char* in_slot) {
    const ProfiledStep step("statedict_io::copy_and_crc32");
    const ReadGate::Reading reading(shared_.options.gate);
    uint32_t crc = 0;
    if (shared_.options.compute_crc32) {
      crc = crc32_copy(0, in_slot, source, part.nbytes);
    } else {
      std::memcpy(in_slot, source, part.nbytes);
    }
    add(part, source, crc);
  }

  void add(const RowPart& part, const char* bytes, uint32_t crc) {
    shared_.results.add_crc(part.strip, crc, part.nbytes_after);
    shared_.results.add_first_bytes(part.strip, part.strip_offset, bytes, part.nbytes);
  }

  // Past the page cache as far as they are whole blocks, where that is worth a wait for the device.
  void write_from_slot(uint64_t begin, uint64_t end, const char* bytes) {
    if (!gathers_) {
      write_bytes(shared_.buffered, begin, bytes, end - begin);
      return;
    }
    const uint64_t alignment = shared_.direct.alignment();
    const uint64_t block_begin = (begin + alignment - 1) / alignment * alignment;
    const uint64_t block_end = end / alignment * alignment;
    if (block_end < block_begin + kDirectFromNbytes) {
      held_.add(begin, bytes, end - begin);
      return;
    }
    held_.add(begin, bytes, block_begin - begin);
    write_bytes(shared_.direct, block_begin, bytes + (block_begin - begin), block_end - block_begin);
    held_.add(block_end, bytes + (block_end - begin), end - block_end);
  }

  void write_in_place(const RowPart& part, const char* source) {
    uint32_t crc = 0;
    for (uint64_t done = 0; done < part.nbytes;) {
      const uint64_t nbytes = std::min(kCacheNbytes, part.nbytes - done);
      const ReadGate::Reading reading(shared_.options.gate);
      if (shared_.options.compute_crc32) {
        const ProfiledStep step("statedict_io::crc32");
        crc = crc32(crc, source + done, nbytes);
      }
      write_bytes(shared_.buffered, part.file_offset + done, source + done, nbytes);
      if (done == 0) shared_.results.add_first_bytes(part.strip, part.strip_offset, source, nbytes);
      done += nbytes;
    }
    shared_.results.add_crc(part.strip, crc, part.nbytes_after);
  }

  Shared& shared_;
  const bool gathers_;
  HeldWrites held_;
};

// Blocks of short rows, each of which is written by itself, through the page cache.
class ShortRows {
 public:
  explicit ShortRows(Shared& shared) : shared_(shared) {}

  void fill(const RowBlock& block, char* slot) {
    const Strip& strip = shared_.strips[block.strip];
    if (!strip.on_device()) return;
    const uint64_t strip_offset = block.first_row * strip.row_nbytes;
    copy_from_device(*shared_.devices,
                     {{strip.source, strip.source_offset + strip_offset, block.num_rows * strip.row_nbytes, slot}});
  }

  // `writes` is asked now and then whether to go on: a block may have very many rows.
  uint64_t write(const RowBlock& block, const char* slot, StagedWrites& writes) {
    const Strip& strip = shared_.strips[block.strip];
    const uint64_t strip_offset = block.first_row * strip.row_nbytes;
    const char* const bytes = strip.on_device() ? slot : strip.data + strip_offset;
    uint32_t crc = 0;  // of the rows so far, with zeros between them
    for (uint64_t row = 0; row < block.num_rows; ++row) {
      const char* const source = bytes + row * strip.row_nbytes;
      {
        const ReadGate::Reading reading(shared_.options.gate);
        shared_.results.add_first_bytes(block.strip, strip_offset + row * strip.row_nbytes, source, strip.row_nbytes);
        if (shared_.options.compute_crc32) {
          crc = crc32_shift(crc, strip.file_pitch) ^ crc32(0, source, strip.row_nbytes);
        }
      }
      write_bytes(shared_.buffered, strip.file_offset + (block.first_row + row) * strip.file_pitch, source,
                  strip.row_nbytes);
      if (row % kRowsBetweenLooks == 0 && !writes.go_on()) return 0;
    }
    const uint64_t rows_after = strip.num_rows - block.first_row - block.num_rows;
    shared_.results.add_crc(block.strip, crc, strip.nbytes_after + rows_after * strip.file_pitch);
    return block.num_rows * strip.row_nbytes;
  }

 private:
  Shared& shared_;
};

// Regions first, then blocks.
class StripWrite final : public StagedWriter {
 public:
  StripWrite(const std::vector<Strip>& strips, PositionalSink& direct, PositionalSink& buffered, DeviceSource* devices,
             const StripOptions& options)
      : shared_{strips,
                direct,
                buffered,
                devices,
                options,
                StripPlan(strips, region_nbytes(strips, direct, options), direct.alignment()),
                Results(strips.size())},
        writes_(*this, devices != nullptr ? devices->slots() : SlotPool::host()) {}

  std::vector<StripResult> run(const Watcher& watch) {
    const StripOptions& options = shared_.options;
    const size_t num_writers = options.num_writers != 0
                                   ? options.num_writers
                                   : default_num_writers(shared_.direct.direct(), shared_.devices != nullptr);
    writes_.run(shared_.plan.regions.size() + shared_.plan.blocks.size(), num_writers, watch);
    long_rows_.finish();
    watch(shared_.plan.nbytes);
    return shared_.results.take();
  }

  void fill(StagedWrite& staged) override {
    char* const slot = staged.slot.data();
    if (is_region(staged)) {
      long_rows_.fill(region(staged), slot);
    } else {
      short_rows_.fill(block(staged), slot);
    }
  }

  uint64_t write(StagedWrite& staged) override {
    const char* const slot = staged.slot.data();
    return is_region(staged) ? long_rows_.write(region(staged), slot) : short_rows_.write(block(staged), slot, writes_);
  }

  void cancel() override {
    if (shared_.options.gate != nullptr) shared_.options.gate->cancel();
  }

 private:
  static uint64_t region_nbytes(const std::vector<Strip>& strips, const PositionalSink& direct,
                                const StripOptions& options) {
    if (options.region_nbytes != 0) return options.region_nbytes;
    uint64_t nbytes = 0;
    for (const Strip& strip : strips) nbytes += strip.nbytes();
    return default_region_nbytes(nbytes, direct.direct());
  }

  bool is_region(const StagedWrite& staged) const { return staged.index < shared_.plan.regions.size(); }
  const StripRegion& region(const StagedWrite& staged) const { return shared_.plan.regions[staged.index]; }
  const RowBlock& block(const StagedWrite& staged) const {
    return shared_.plan.blocks[staged.index - shared_.plan.regions.size()];
  }

  Shared shared_;
  LongRows long_rows_{shared_};
  ShortRows short_rows_{shared_};
  StagedWrites writes_;
};

}  // namespace

std::vector<StripResult> write_strips(const std::vector<Strip>& strips, PositionalSink& direct,
                                      PositionalSink& buffered, DeviceSource* devices, const StripOptions& options,
                                      const Watcher& watch) {
  return StripWrite(strips, direct, buffered, devices, options).run(watch);
}

}  // namespace sdio
