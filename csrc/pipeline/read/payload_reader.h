// Reads the payloads of many records at once, in parallel: into memory that outlives the read, or through slots on to a
// device or to checksum them. The three are in read_into_memory.cpp, read_onto_device.cpp and read_checksums.cpp, what
// they share in parallel_read.h.
//
// Records are read in spans of 8 MiB, small ones of 1 MiB (read_plan.h). First the workers read the headers of records
// that lie in several spans, and then take the spans, in file order: of everything that a span holds it is known where
// the payload begins. A direct read into a mirrored extent lands where the tensors are: nothing is copied, unless the
// writer did not align a payload to 16 bytes; then it is moved down over its own header. One without a header is copied
// out where it is not aligned as its elements need. One worker first faults the
// mirror in, ahead of the reads of the others. A worker checksums what it has read; who reads the last byte of a record
// hands the payload over. Buffered reads are made 1 MiB at a time, so that checksum and copy find the bytes in the
// cache. Gaps between payloads go back to the system after the read.
//
// For a device a worker has two slots, reads into one while the other is copied from, and waits for that copy before it
// reads there again: at most 16 slots, 128 MiB, whatever the size of the largest tensor. Checksums alone take slots
// too.
//
// Each call returns when all is read; one source serves several calls at once. Throws CorruptArchive,
// UnexpectedEnd, SystemError, std::bad_alloc, std::invalid_argument for records that are compressed or asked for
// twice, and what `watch` or the memory throws.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "archive/directory.h"
#include "file/positional_source.h"
#include "pipeline/read/device_destination.h"
#include "pipeline/read/payload_memory.h"

namespace sdio {

struct ReadOptions {
  size_t num_threads = 0;    // 0: chosen from the machine
  uint64_t span_nbytes = 0;  // 0: kSlotNbytes; a power of two, at least a page, at most kSlotNbytes
};

// As Watcher, with the bytes of all spans, headers included.
using ReadWatcher = std::function<void(uint64_t bytes_done, uint64_t bytes_total)>;

// Puts the payload of records[i] into `memory` as request i. Under `verify` returns the records whose CRC-32 is not the
// recorded one, in ascending order.
std::vector<size_t> load_payloads(const Directory& directory, PositionalSource& source,
                                  const std::vector<size_t>& records, PayloadMemory& memory, bool verify,
                                  const ReadOptions& options, const ReadWatcher& watch);

// The same onto a device, copied while the next spans are read; every copy has landed when it returns or throws.
std::vector<size_t> load_payloads_onto(const Directory& directory, PositionalSource& source,
                                       const std::vector<size_t>& records, DeviceDestination& device, bool verify,
                                       const ReadOptions& options, const ReadWatcher& watch);

// The CRC-32 of each payload, in memory that does not grow with them.
std::vector<uint32_t> payload_checksums(const Directory& directory, PositionalSource& source,
                                        const std::vector<size_t>& records, const ReadOptions& options,
                                        const ReadWatcher& watch);

}  // namespace sdio
