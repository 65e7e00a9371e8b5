// What all ways of reading payloads have in common: two steps, each in several threads. First the headers are read of
// the records that lie in several spans of the plan, then the spans.
//
// There is a derived class for each way: into memory, onto a device, for the CRCs alone. It gives the spans memory to
// be read to (work), and takes over each payload of which every byte has been read (finish). Both are called in several
// threads at once. An object serves one run().
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "archive/directory.h"
#include "file/positional_source.h"
#include "pipeline/read/payload_reader.h"
#include "pipeline/read/read_plan.h"
#include "pipeline/threads/worker_threads.h"

namespace sdio {

class ParallelRead {
 public:
  virtual ~ParallelRead() = default;
  ParallelRead(const ParallelRead&) = delete;
  ParallelRead& operator=(const ParallelRead&) = delete;

  // Returns when all has been read. Throws what was thrown first, by `watch` or in a worker, when all have ended.
  void run(const ReadWatcher& watch);

  // Afterwards, where they are computed: those of the payloads, in the order in which the records were asked for.
  std::vector<uint32_t>& crcs() { return crcs_; }

  // The records, in ascending order, whose CRC is not the one in the directory.
  std::vector<size_t> with_wrong_crc() const;

 protected:
  // A span, and the memory that it is read to.
  struct SpanMemory {
    const PlannedSpan& span;
    char* memory;

    char* at(uint64_t file_offset) const { return memory + static_cast<int64_t>(file_offset - span.begin); }
  };

  ParallelRead(const Directory& directory, PositionalSource& source, const std::vector<size_t>& records,
               ReadPlan::Keep keep, bool checksum, const ReadOptions& options, size_t default_num_threads);

  // The work of one thread: takes spans until there are none left.
  virtual void work(WorkerThreads& workers) = 0;
  // Takes over the payload of plan_.records[index], or its CRC alone. Every byte has been read, the last of them into
  // `last`; there are all of them, unless the record is large and `last` a slot.
  virtual void finish(size_t index, const SpanMemory& last);
  // When all workers have ended without an error.
  virtual void all_read() {}

  // Calls `handle` for spans that no other thread gets, in file order, until there are none or the read is cancelled.
  template <typename Handle>
  void for_each_span(WorkerThreads& workers, const Handle& handle) {
    for (size_t i = next_span_++; i < plan_.spans.size() && workers.go_on(); i = next_span_++) handle(plan_.spans[i]);
  }

  void read(const SpanMemory& to, WorkerThreads& workers);

  // In the file, of a record of a span that has been read.
  uint64_t payload_begin(size_t index) const { return states_[index].payload_begin; }

  static uint64_t plan_alignment(const PositionalSource& source);

  const Directory& directory_;
  PositionalSource& source_;
  const ReadPlan plan_;
  const bool checksum_;
  const size_t num_threads_;  // 0: the caller reads
  std::vector<uint32_t> crcs_;
  std::atomic<size_t> next_span_{0};

 private:
  // What is known of a record so far, from whichever threads have read parts of it.
  struct RecordState {
    std::atomic<uint64_t> nbytes_left{0};
    std::atomic<uint32_t> crc{0};  // of a large one, from its pieces in any order
    // In the file; 0: the header has not been read. Set at the beginning where there is none, else in the first step,
    // or by the only thread that reads the record.
    uint64_t payload_begin = 0;
  };

  size_t num_threads(const ReadOptions& options, size_t default_num_threads) const;
  void read_headers(const ReadWatcher& watch);
  uint64_t read_payload_begin(size_t record, char* memory);
  void absorb(const SpanMemory& bytes, uint64_t begin, uint64_t end, size_t& first_record);
  bool find_payload(const SpanMemory& bytes, size_t index, uint64_t end);
  void add_crc(const SpanMemory& bytes, size_t index, uint64_t begin, uint64_t end);

  const std::unique_ptr<RecordState[]> states_;  // of plan_.records
  std::atomic<uint64_t> bytes_done_{0};
};

// For what passes through slots, where the cores checksum or copy.
size_t threads_for_slots();

}  // namespace sdio
