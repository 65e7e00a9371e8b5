// CPU storages like those of torch.load (not resizable, freed by their last owner) over memory that the pipeline
// filled.
//
// allocate() and adopt() are called from several workers at once; the rest from one thread, without need of the GIL.
// No dispatcher is involved: ambient devices, default devices and inference mode change nothing.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>

#include <memory>
#include <vector>

#include "pipeline/payload_memory.h"

namespace sdio {

class StorageMemory final : public PayloadMemory {
 public:
  explicit StorageMemory(size_t num_requests) : parts_(num_requests) {}

  char* allocate(size_t request, uint64_t nbytes) override;
  void adopt(size_t request, char* data, uint64_t nbytes, std::shared_ptr<ExtentMemory> extent) override;

  // One storage a request; once.
  std::vector<c10::Storage> take_storages();

 private:
  struct Part {
    c10::DataPtr data;
    size_t nbytes = 0;
  };
  std::vector<Part> parts_;
};

}  // namespace sdio
