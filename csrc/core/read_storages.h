// CPU storages like those of torch.load (not resizable, freed by their last owner) over memory that the pipeline
// filled.
//
// allocate() and adopt() are called from several workers at once; storages() with the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "core/torch.h"
#include "pipeline/read/payload_memory.h"

namespace sdio {

class ReadStorages final : public PayloadMemory {
 public:
  explicit ReadStorages(size_t num_requests) : parts_(num_requests) {}

  char* allocate(size_t request, uint64_t nbytes) override;
  void adopt(size_t request, char* data, uint64_t nbytes, std::shared_ptr<ExtentMemory> extent) override;

  // One torch.UntypedStorage a request; once.
  pybind11::list storages();

 private:
  struct Part {
    std::unique_ptr<ReadMemory> memory;
    char* data = nullptr;
    uint64_t nbytes = 0;
  };
  std::vector<Part> parts_;
};

}  // namespace sdio
