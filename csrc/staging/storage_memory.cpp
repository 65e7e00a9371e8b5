#include "staging/storage_memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>

#include <utility>

namespace sdio {
namespace {

struct ExtentPart {
  std::shared_ptr<ExtentMemory> extent;
  char* data;
  uint64_t nbytes;
};

void delete_part(void* context) {
  const std::unique_ptr<ExtentPart> part(static_cast<ExtentPart*>(context));
  // The last one gives back everything by unmapping.
  if (part->extent.use_count() > 1) ExtentMemory::release(part->data, part->nbytes);
}

}  // namespace

char* StorageMemory::allocate(size_t request, uint64_t nbytes) {
  Part& part = parts_[request];
  part.data = c10::GetCPUAllocator()->allocate(nbytes);
  part.nbytes = nbytes;
  return static_cast<char*>(part.data.get());
}

void StorageMemory::adopt(size_t request, char* data, uint64_t nbytes, std::shared_ptr<ExtentMemory> extent) {
  Part& part = parts_[request];
  part.data = c10::DataPtr(data, new ExtentPart{std::move(extent), data, nbytes}, &delete_part, c10::DeviceType::CPU);
  part.nbytes = nbytes;
}

std::vector<c10::Storage> StorageMemory::take_storages() {
  std::vector<c10::Storage> storages;
  storages.reserve(parts_.size());
  for (Part& part : parts_) {
    // Not resizable, as torch.load's: else a tensor that claims more than its storage would have it grown.
    storages.emplace_back(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), part.nbytes,
                                                                std::move(part.data), c10::GetCPUAllocator(),
                                                                /*resizable=*/false));
  }
  return storages;
}

}  // namespace sdio
