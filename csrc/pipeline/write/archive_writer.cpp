#include "pipeline/write/archive_writer.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "pipeline/memory/slot_pool.h"
#include "pipeline/threads/profiled_step.h"
#include "pipeline/write/region_assembler.h"
#include "pipeline/write/staged_writes.h"
#include "pipeline/write/write_pace.h"

namespace sdio {
namespace {

// For smaller files, reserving blocks costs more than it saves.
constexpr uint64_t kPreallocateFromNbytes = 4u << 20;

size_t num_writers(const WriteOptions& options, bool from_device, const PositionalSink& sink) {
  if (options.num_writers != 0) return options.num_writers;
  const size_t num_writers = default_num_writers(sink.direct(), from_device);
  return options.digest == nullptr ? num_writers : std::max<size_t>(num_writers, 2);  // one hashes, another writes
}

// A direct write is a whole number of blocks; the file is cut to its length afterwards.
void pad_to_blocks(char* slot, iovec& piece, size_t alignment) {
  const size_t blocks = (piece.iov_len + alignment - 1) / alignment;
  const size_t padded = std::min(blocks * alignment, kSlotNbytes);
  std::memset(slot + piece.iov_len, 0, padded - piece.iov_len);
  piece.iov_len = padded;
}

// What the workers of one write share.
struct Writing {
  Writing(PositionalSink& sink_, const WriteOptions& options) : sink(sink_), pace(options.bytes_per_second) {}

  void write(uint64_t begin, uint64_t nbytes, std::vector<iovec>& pieces) {
    pace.wait_for(nbytes);
    const ProfiledStep step("statedict_io::write");
    sink.write(begin, pieces);
  }

  PositionalSink& sink;
  WritePace pace;
};

class ArchiveRegions final : public StagedWriter {
 public:
  ArchiveRegions(const Records& records, const Regions& regions, PositionalSink& sink, const WriteOptions& options)
      : records_(records),
        regions_(regions),
        assembler_(records),
        gather_(sink.direct() ? RegionAssembler::Gather::kAll : RegionAssembler::Gather::kSmall),
        digest_(options.digest),
        writing_(sink, options) {}

  void fill(StagedWrite& staged) override {
    const uint64_t begin = regions_.begin(staged.index);
    const uint64_t nbytes = regions_.nbytes_of(staged.index);
    const bool is_hole = records_.is_hole(begin, nbytes);
    if (!is_hole) assembler_.assemble(begin, nbytes, staged.slot.memory(), gather_, staged.pieces);
    if (digest_ != nullptr) digest_->add(staged.index, staged.pieces, nbytes, records_.gate);
    if (is_hole) return;
    if (gather_ == RegionAssembler::Gather::kAll) {
      pad_to_blocks(staged.slot.data(), staged.pieces.front(), writing_.sink.alignment());
    }
  }

  uint64_t write(StagedWrite& staged) override {
    const uint64_t nbytes = regions_.nbytes_of(staged.index);
    if (!staged.pieces.empty()) writing_.write(regions_.begin(staged.index), nbytes, staged.pieces);
    return nbytes;
  }

  void cancel() override {
    assembler_.cancel();
    if (digest_ != nullptr) digest_->cancel();
    writing_.pace.cancel();
  }

 private:
  const Records& records_;
  const Regions regions_;
  RegionAssembler assembler_;
  const RegionAssembler::Gather gather_;
  FileDigest* const digest_;
  Writing writing_;
};

class SnapshotRegions final : public RegionWorker {
 public:
  SnapshotRegions(HostSnapshot& snapshot, Writing& writing, FileDigest* digest)
      : snapshot_(snapshot), writing_(writing), digest_(digest) {}

  void work(uint64_t begin, uint64_t nbytes) override {
    char* const memory = snapshot_.memory(begin);
    pieces_.clear();
    if (memory != nullptr) pieces_.push_back({memory, nbytes});
    if (digest_ != nullptr) digest_->add(begin / kSlotNbytes, pieces_, nbytes, nullptr);
    if (memory == nullptr) return;
    if (writing_.sink.direct()) pad_to_blocks(memory, pieces_.front(), writing_.sink.alignment());
    writing_.write(begin, nbytes, pieces_);
  }

 private:
  HostSnapshot& snapshot_;
  Writing& writing_;
  FileDigest* const digest_;
  std::vector<iovec> pieces_;
};

void preallocate(PositionalSink& sink, uint64_t file_nbytes) {
  if (!sink.direct() && file_nbytes < kPreallocateFromNbytes) return;
  const ProfiledStep step("statedict_io::preallocate");
  sink.preallocate(file_nbytes);
}

}  // namespace

void write_archive(const Records& records, PositionalSink& sink, const WriteOptions& options, const Watcher& watch) {
  const uint64_t file_nbytes = records.layout->file_nbytes();
  const bool from_device = records.devices != nullptr;
  const uint64_t region_nbytes = options.region_nbytes != 0
                                     ? options.region_nbytes
                                     : default_region_nbytes(file_nbytes, sink.direct() && !from_device);
  const Regions regions{file_nbytes, region_nbytes};
  ArchiveRegions writer(records, regions, sink, options);
  preallocate(sink, file_nbytes);
  StagedWrites(writer, from_device ? records.devices->slots() : SlotPool::host())
      .run(regions.count(), num_writers(options, from_device, sink), watch);
  sink.set_nbytes(file_nbytes);
  watch(file_nbytes);
}

void write_snapshot(HostSnapshot& snapshot, PositionalSink& sink, const WriteOptions& options, const Watcher& watch) {
  const uint64_t file_nbytes = snapshot.file_nbytes();
  Writing writing(sink, options);
  preallocate(sink, file_nbytes);
  for_each_region(
      {file_nbytes, kSlotNbytes}, num_writers(options, /*from_device=*/false, sink),
      [&] { return std::make_unique<SnapshotRegions>(snapshot, writing, options.digest); },
      [&] {
        if (options.digest != nullptr) options.digest->cancel();
        writing.pace.cancel();
      },
      watch);
  sink.set_nbytes(file_nbytes);
  watch(file_nbytes);
}

void stream_archive(const Records& records, const StreamWrite& write, const Watcher& watch) {
  RegionAssembler assembler(records);
  const uint64_t file_nbytes = records.layout->file_nbytes();
  const SlotPool::Handle slot =
      records.devices != nullptr ? records.devices->slots().acquire() : SlotPool::host().acquire();
  // `write` may run code that moves payloads, so what it is given must be a copy.
  const auto gather = records.gate != nullptr ? RegionAssembler::Gather::kAll : RegionAssembler::Gather::kSmall;
  std::vector<iovec> pieces;
  for (uint64_t begin = 0; begin < file_nbytes; begin += kSlotNbytes) {
    pieces.clear();
    const uint64_t nbytes = std::min<uint64_t>(kSlotNbytes, file_nbytes - begin);
    assembler.assemble(begin, nbytes, slot.memory(), gather, pieces);
    for (const iovec& piece : pieces) write(static_cast<const char*>(piece.iov_base), piece.iov_len);
    watch(begin + nbytes);
  }
}

void stream_snapshot(HostSnapshot& snapshot, const StreamWrite& write, const Watcher& watch) {
  const uint64_t file_nbytes = snapshot.file_nbytes();
  for (uint64_t begin = 0; begin < file_nbytes; begin += kSlotNbytes) {
    const uint64_t nbytes = std::min<uint64_t>(kSlotNbytes, file_nbytes - begin);
    if (const char* const memory = snapshot.memory(begin)) {
      write(memory, nbytes);
    } else {
      const std::vector<char> zeros(nbytes);
      write(zeros.data(), nbytes);
    }
    watch(begin + nbytes);
  }
}

}  // namespace sdio
