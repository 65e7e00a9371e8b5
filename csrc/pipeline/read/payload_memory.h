// Where the payloads that are read end up, as the pipeline sees it; core makes torch storages of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "pipeline/memory/extent_memory.h"

namespace sdio {

// `request` is an index into the list of records that was asked for. The methods are called from several workers at
// once, at most once for each request.
class PayloadMemory {
 public:
  virtual ~PayloadMemory() = default;

  // Returns memory for one payload alone. Throws std::bad_alloc or what the allocator throws.
  virtual char* allocate(size_t request, uint64_t nbytes) = 0;

  // Takes over a payload that lies at `data` in `extent`.
  virtual void adopt(size_t request, char* data, uint64_t nbytes, std::shared_ptr<ExtentMemory> extent) = 0;

  // Overridden by tests.
  virtual std::shared_ptr<ExtentMemory> map_extent(uint64_t file_offset, uint64_t nbytes) {
    return std::make_shared<ExtentMemory>(file_offset, nbytes);
  }
};

}  // namespace sdio
