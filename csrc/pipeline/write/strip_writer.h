// Writes parts of records into a file that other processes write at the same time.
//
// Long rows are gathered by regions and their whole blocks written past the page cache; what shares a block with bytes
// of others, and short rows, goes through it, where writers of one block do not lose each other's bytes. Such bytes at
// the ends of long rows are held back until the process has no region left (held_writes.h). What a strip adds to its
// record's CRC is computed by Horner's rule over its rows: shift by the pitch, add the row's CRC.
#pragma once

#include <cstddef>
#include <vector>

#include "file/positional_sink.h"
#include "pipeline/threads/worker_threads.h"
#include "pipeline/write/device_source.h"
#include "pipeline/write/read_gate.h"
#include "pipeline/write/strip.h"

namespace sdio {

struct StripOptions {
  bool compute_crc32 = true;
  size_t num_writers = 0;    // at once; 0: chosen from the sinks and the machine
  size_t region_nbytes = 0;  // 0: chosen from the strips; at most kSlotNbytes, a multiple of 64 KiB
  ReadGate* gate = nullptr;  // passed while `data` of strips is read; null where nothing moves it
};

// Returns one result a strip. `direct` and `buffered` are two descriptions of one open file, so that one can write past
// the page cache; `direct` may also turn out to be buffered. Strips must not overlap. Takes the calling thread's time;
// throws SystemError, std::bad_alloc, and what `watch` or the device throws.
std::vector<StripResult> write_strips(const std::vector<Strip>& strips, PositionalSink& direct,
                                      PositionalSink& buffered, DeviceSource* devices, const StripOptions& options,
                                      const Watcher& watch);

}  // namespace sdio
