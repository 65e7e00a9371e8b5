// Where the payloads that are read end up, as the pipeline sees it; core makes torch storages of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "pipeline/memory/extent_memory.h"

namespace sdio {

// `request` is an index into the list of records that was asked for. Called from several workers at once, at most once
// a request.
class PayloadMemory {
 public:
  virtual ~PayloadMemory() = default;

  // Memory of its own for a payload. Throws std::bad_alloc or what the allocator throws.
  virtual char* allocate(size_t request, uint64_t nbytes) = 0;

  // The payload lies at `data` in `extent`, and is the new owner's.
  virtual void adopt(size_t request, char* data, uint64_t nbytes, std::shared_ptr<ExtentMemory> extent) = 0;

  // Overridden by tests.
  virtual std::shared_ptr<ExtentMemory> map_extent(uint64_t file_offset, uint64_t nbytes) {
    return std::make_shared<ExtentMemory>(file_offset, nbytes);
  }
};

}  // namespace sdio
