// Writes one file, an archive or payloads alone: into a file in parallel and at offsets, or through a callback from
// front to back.
//
// Each call returns when it is written; different ones may be written at once. The payloads must stay
// readable and unchanged until then.
//
// The file is cut into regions, 8 MiB at multiples of 8 MiB. Past the page cache a region is assembled in a slot of
// huge pages and written from there; through it, large pieces of payloads are not copied at all but handed to pwritev
// where they lie. The calling thread does not hold the GIL; every 50 ms it calls `watch`, which takes it to look for
// signals and to report progress. An exception in `watch` stops the workers and is thrown when they have stopped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "file/positional_sink.h"
#include "pipeline/threads/parallel_regions.h"
#include "pipeline/threads/worker_threads.h"
#include "pipeline/write/file_digest.h"
#include "pipeline/write/host_snapshot.h"
#include "pipeline/write/records.h"

namespace sdio {

struct WriteOptions {
  size_t num_writers = 0;        // at once; 0: chosen from the sink, the device and the machine
  size_t region_nbytes = 0;      // 0: chosen from the sink; a power of two, at most kSlotNbytes
  double bytes_per_second = 0;   // 0: as fast as it goes
  FileDigest* digest = nullptr;  // is given all bytes of the file; serves one write
};

// The file may hold anything before; it holds the records after. Throws SystemError, std::bad_alloc, and what `watch`
// or the device throws.
void write_archive(const Records& records, PositionalSink& sink, const WriteOptions& options, const Watcher& watch);

// The same from a snapshot. `region_nbytes` does not count: the regions are those of the snapshot.
void write_snapshot(HostSnapshot& snapshot, PositionalSink& sink, const WriteOptions& options, const Watcher& watch);

// `write` takes every byte it is given or throws.
using StreamWrite = std::function<void(const char* bytes, size_t nbytes)>;
void stream_archive(const Records& records, const StreamWrite& write, const Watcher& watch);
void stream_snapshot(HostSnapshot& snapshot, const StreamWrite& write, const Watcher& watch);

}  // namespace sdio
