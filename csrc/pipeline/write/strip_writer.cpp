#include "pipeline/write/strip_writer.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "checksum/crc32.h"
#include "pipeline/memory/slot_pool.h"
#include "pipeline/threads/profiled_step.h"
#include "pipeline/write/staged_writes.h"

namespace sdio {
namespace {

// Rows of at least this take part in regions; shorter ones are written one by one, in blocks of rows.
constexpr uint64_t kLongRowNbytes = 64u << 10;
// Fewer whole blocks than this are not worth a wait for the device.
constexpr uint64_t kDirectFromNbytes = 64u << 10;
// Checksummed, then written while still in cache.
constexpr uint64_t kCacheNbytes = 1u << 20;
// Of bytes that wait for the end.
constexpr size_t kMaxHeldNbytes = 8u << 20;
constexpr uint64_t kRowsBetweenLooks = 256;
// As in archive_writer.cpp, for the bytes of this process.
constexpr size_t kSmallestRegionNbytes = 1u << 20;
constexpr uint64_t kRegionsAtLeast = 32;

// Bytes of a strip that are one run in memory and in the file.
struct Segment {
  size_t strip;
  uint64_t strip_offset;
  uint64_t file_offset;
  uint64_t nbytes;
  uint64_t nbytes_after;  // of the record
};

// One staged write: segments of one region, or (num_rows != 0) short rows of one strip.
struct Task {
  size_t first;  // segment, or strip
  size_t count;  // of segments
  uint64_t first_row;
  uint64_t num_rows;
};

class StripWrite final : public StagedWriter {
 public:
  StripWrite(const std::vector<Strip>& strips, PositionalSink& direct, PositionalSink& buffered, DeviceSource* devices,
             const StripOptions& options)
      : strips_(strips),
        direct_(direct),
        buffered_(buffered),
        devices_(devices),
        options_(options),
        gathers_(direct.direct()),
        region_nbytes_(options.region_nbytes != 0 ? options.region_nbytes : default_region_nbytes()),
        crcs_(new std::atomic<uint32_t>[strips.size()]),
        results_(strips.size()),
        writes_(*this, devices != nullptr ? devices->slots() : SlotPool::host()) {
    for (size_t i = 0; i < strips.size(); ++i) crcs_[i] = 0;
    plan();
  }

  std::vector<StripResult> run(const Watcher& watch) {
    writes_.run(regions_.size() + rows_.size(), num_writers(), watch);
    flush(held_);
    for (size_t i = 0; i < strips_.size(); ++i) results_[i].crc = crcs_[i];
    watch(total_nbytes_);
    return std::move(results_);
  }

  void fill(StagedWrite& staged) override {
    if (staged.index < regions_.size()) {
      fill_region(regions_[staged.index], staged.slot.data());
    } else {
      fill_rows(rows_[staged.index - regions_.size()], staged.slot.data());
    }
  }

  uint64_t write(StagedWrite& staged) override {
    return staged.index < regions_.size() ? write_region(regions_[staged.index], staged.slot.data())
                                          : write_rows(rows_[staged.index - regions_.size()], staged.slot.data());
  }

  void cancel() override {  // go_on() is asked
    if (options_.gate != nullptr) options_.gate->cancel();
  }

 private:
  // Bytes for the page cache, held back until no thread of this process writes past it. A buffered write has the inode
  // to itself: it waits for the direct ones of all processes, and those that come later wait for it. One at the end of
  // each shard of 32 MiB made a save of 1 GiB by two ranks 7 to 46 % longer (three runs).
  struct Edge {
    uint64_t file_offset;
    std::string bytes;
  };
  struct Held {
    std::vector<Edge> edges;
    size_t nbytes = 0;  // of memory, about
  };

  size_t num_writers() const {
    if (options_.num_writers != 0) return options_.num_writers;
    return default_num_writers(direct_.direct(), devices_ != nullptr);
  }

  size_t default_region_nbytes() const {
    uint64_t total = 0;
    for (const Strip& strip : strips_) total += strip.nbytes();
    size_t nbytes = kSlotNbytes;
    while (direct_.direct() && nbytes > kSmallestRegionNbytes && total / nbytes < kRegionsAtLeast) nbytes /= 2;
    return nbytes;
  }

  void plan() {
    std::vector<Segment> runs;
    for (size_t i = 0; i < strips_.size(); ++i) {
      const Strip& strip = strips_[i];
      total_nbytes_ += strip.nbytes();
      if (strip.num_rows != 1 && strip.row_nbytes < kLongRowNbytes) {
        add_short_rows(i);
      } else {
        for (uint64_t row = 0; row < strip.num_rows; ++row) {
          const uint64_t after = strip.nbytes_after + (strip.num_rows - 1 - row) * strip.file_pitch;
          runs.push_back(
              {i, row * strip.row_nbytes, strip.file_offset + row * strip.file_pitch, strip.row_nbytes, after});
        }
      }
    }
    std::sort(runs.begin(), runs.end(),
              [](const Segment& a, const Segment& b) { return a.file_offset < b.file_offset; });
    for (const Segment& run : runs) cut_into_regions(run);
  }

  // A region begins, at a block, where the one before has ended and something is to be written.
  void cut_into_regions(Segment run) {
    for (uint64_t left = run.nbytes; left != 0; left -= run.nbytes) {
      if (run.file_offset >= region_end_) {
        region_end_ = region_begin(run) + region_nbytes_;
        regions_.push_back({segments_.size(), 0, 0, 0});
      }
      run.nbytes = std::min(left, region_end_ - run.file_offset);
      segments_.push_back(run);
      segments_.back().nbytes_after += left - run.nbytes;
      ++regions_.back().count;
      run.file_offset += run.nbytes;
      run.strip_offset += run.nbytes;
    }
  }

  uint64_t region_begin(const Segment& first) const {
    return first.file_offset / direct_.alignment() * direct_.alignment();
  }

  void add_short_rows(size_t index) {
    const Strip& strip = strips_[index];
    if (strip.nbytes() == 0) return;
    const uint64_t at_once = std::max<uint64_t>(region_nbytes_ / strip.row_nbytes, 1);
    for (uint64_t row = 0; row < strip.num_rows; row += at_once) {
      rows_.push_back({index, 0, row, std::min(at_once, strip.num_rows - row)});
    }
  }

  // --- long rows

  void fill_region(const Task& task, char* slot) {
    const Segment* const first = &segments_[task.first];
    const Segment* const last = first + task.count;
    const uint64_t region = region_begin(*first);
    std::vector<DevicePiece> device_pieces;
    for (const Segment* segment = first; segment != last; ++segment) {
      const Strip& strip = strips_[segment->strip];
      char* const in_slot = slot + (segment->file_offset - region);
      if (strip.data == nullptr) {
        device_pieces.push_back({strip.source, strip.source_offset + segment->strip_offset, segment->nbytes, in_slot});
      } else if (gathers_) {
        gather_in_slot(*segment, strip.data + segment->strip_offset, in_slot);
      }
    }
    if (device_pieces.empty()) return;
    copy_from_device(device_pieces);
    const ProfiledStep step("statedict_io::crc32");
    for (const Segment* segment = first; segment != last; ++segment) {
      if (strips_[segment->strip].data != nullptr) continue;
      const char* bytes = slot + (segment->file_offset - region);
      report(*segment, bytes, options_.compute_crc32 ? crc32(0, bytes, segment->nbytes) : 0);
    }
  }

  uint64_t write_region(const Task& task, const char* slot) {
    const Segment* const first = &segments_[task.first];
    const Segment* const last = first + task.count;
    uint64_t nbytes = 0;
    for (const Segment* segment = first; segment != last; ++segment) {
      nbytes += segment->nbytes;
      const Strip& strip = strips_[segment->strip];
      if (strip.data != nullptr && !gathers_) write_in_place(*segment, strip.data + segment->strip_offset);
    }
    write_gathered(first, last, slot, region_begin(*first));
    return nbytes;
  }

  void gather_in_slot(const Segment& segment, const char* source, char* in_slot) {
    const ProfiledStep step("statedict_io::copy_and_crc32");
    const ReadGate::Reading reading(options_.gate);
    uint32_t crc = 0;
    if (options_.compute_crc32) {
      crc = crc32_copy(0, in_slot, source, segment.nbytes);
    } else {
      std::memcpy(in_slot, source, segment.nbytes);
    }
    report(segment, source, crc);
  }

  void copy_from_device(const std::vector<DevicePiece>& pieces) {
    const ProfiledStep step("statedict_io::device_to_host");
    devices_->copy(pieces);
  }

  // The runs of segments that lie in the slot, joined where they touch.
  void write_gathered(const Segment* first, const Segment* last, const char* slot, uint64_t region) {
    while (first != last) {
      if (!gathers_ && strips_[first->strip].data != nullptr) {  // written where it lay
        ++first;
        continue;
      }
      const uint64_t begin = first->file_offset;
      uint64_t end = begin;
      for (; first != last && first->file_offset == end; ++first) {
        if (!gathers_ && strips_[first->strip].data != nullptr) break;
        end += first->nbytes;
      }
      const uint64_t alignment = direct_.alignment();
      const uint64_t block_begin = (begin + alignment - 1) / alignment * alignment;
      const uint64_t block_end = end / alignment * alignment;
      if (gathers_ && block_end >= block_begin + kDirectFromNbytes) {
        hold(begin, slot + (begin - region), block_begin - begin);
        put(direct_, block_begin, slot + (block_begin - region), block_end - block_begin);
        hold(block_end, slot + (block_end - region), end - block_end);
      } else if (gathers_) {
        hold(begin, slot + (begin - region), end - begin);
      } else {
        put(buffered_, begin, slot + (begin - region), end - begin);
      }
    }
  }

  void write_in_place(const Segment& segment, const char* source) {
    uint32_t crc = 0;
    for (uint64_t done = 0; done < segment.nbytes;) {
      const uint64_t nbytes = std::min(kCacheNbytes, segment.nbytes - done);
      const ReadGate::Reading reading(options_.gate);
      if (options_.compute_crc32) {
        const ProfiledStep step("statedict_io::crc32");
        crc = crc32(crc, source + done, nbytes);
      }
      put(buffered_, segment.file_offset + done, source + done, nbytes);
      if (done == 0) tell_first_bytes(segment.strip, segment.strip_offset, source, nbytes);
      done += nbytes;
    }
    report(segment, crc);
  }

  void report(const Segment& segment, const char* bytes, uint32_t crc) {
    report(segment, crc);
    tell_first_bytes(segment.strip, segment.strip_offset, bytes, segment.nbytes);
  }

  void report(const Segment& segment, uint32_t crc) {
    crcs_[segment.strip].fetch_xor(crc32_shift(crc, segment.nbytes_after));
  }

  // --- short rows

  void fill_rows(const Task& task, char* slot) {
    const Strip& strip = strips_[task.first];
    if (strip.data != nullptr) return;
    const uint64_t strip_offset = task.first_row * strip.row_nbytes;
    copy_from_device({{strip.source, strip.source_offset + strip_offset, task.num_rows * strip.row_nbytes, slot}});
  }

  uint64_t write_rows(const Task& task, const char* slot) {
    const Strip& strip = strips_[task.first];
    const uint64_t strip_offset = task.first_row * strip.row_nbytes;
    const uint64_t nbytes = task.num_rows * strip.row_nbytes;
    const char* const bytes = strip.data != nullptr ? strip.data + strip_offset : slot;
    uint32_t crc = 0;  // of the rows so far, with zeros between them
    for (uint64_t row = 0; row < task.num_rows; ++row) {
      const char* const source = bytes + row * strip.row_nbytes;
      {
        const ReadGate::Reading reading(options_.gate);
        tell_first_bytes(task.first, strip_offset + row * strip.row_nbytes, source, strip.row_nbytes);
        if (options_.compute_crc32) {
          crc = crc32_shift(crc, strip.file_pitch) ^ crc32(0, source, strip.row_nbytes);
        }
      }
      put(buffered_, strip.file_offset + (task.first_row + row) * strip.file_pitch, source, strip.row_nbytes);
      if (row % kRowsBetweenLooks == 0 && !writes_.go_on()) return 0;
    }
    const uint64_t rows_after = strip.num_rows - task.first_row - task.num_rows;
    crcs_[task.first].fetch_xor(crc32_shift(crc, strip.nbytes_after + rows_after * strip.file_pitch));
    return nbytes;
  }

  void tell_first_bytes(size_t strip, uint64_t strip_offset, const char* bytes, uint64_t nbytes) {
    unsigned char* const first_bytes = results_[strip].first_bytes;
    if (strip_offset >= sizeof(StripResult::first_bytes)) return;
    std::memcpy(first_bytes + strip_offset, bytes,
                std::min<uint64_t>(nbytes, sizeof(StripResult::first_bytes) - strip_offset));
  }

  // ---

  static void put(PositionalSink& sink, uint64_t file_offset, const char* bytes, uint64_t nbytes) {
    thread_local std::vector<iovec> pieces;
    pieces.assign(1, {const_cast<char*>(bytes), nbytes});
    const ProfiledStep step("statedict_io::write");
    sink.write(file_offset, pieces);
  }

  void hold(uint64_t file_offset, const char* bytes, uint64_t nbytes) {
    if (nbytes == 0) return;
    Held full;
    {
      const std::lock_guard<std::mutex> lock(held_mutex_);
      held_.edges.push_back({file_offset, std::string(bytes, nbytes)});
      held_.nbytes += sizeof(Edge) + nbytes;
      if (held_.nbytes >= kMaxHeldNbytes) std::swap(held_, full);
    }
    flush(full);
  }

  void flush(const Held& held) {
    for (const Edge& edge : held.edges) put(buffered_, edge.file_offset, edge.bytes.data(), edge.bytes.size());
  }

  const std::vector<Strip>& strips_;
  PositionalSink& direct_;
  PositionalSink& buffered_;
  DeviceSource* const devices_;
  const StripOptions options_;
  const bool gathers_;  // regions in slots, for direct writes; else host memory is written where it lies
  const uint64_t region_nbytes_;
  std::vector<Segment> segments_;
  std::vector<Task> regions_;
  std::vector<Task> rows_;
  uint64_t region_end_ = 0;
  const std::unique_ptr<std::atomic<uint32_t>[]> crcs_;
  std::vector<StripResult> results_;
  uint64_t total_nbytes_ = 0;
  std::mutex held_mutex_;
  Held held_;
  StagedWrites writes_;
};

}  // namespace

std::vector<StripResult> write_strips(const std::vector<Strip>& strips, PositionalSink& direct,
                                      PositionalSink& buffered, DeviceSource* devices, const StripOptions& options,
                                      const Watcher& watch) {
  return StripWrite(strips, direct, buffered, devices, options).run(watch);
}

}  // namespace sdio
