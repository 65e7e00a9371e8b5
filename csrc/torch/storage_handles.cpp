#include <utility>

#include "torch/functions.h"
#include "torch/raw_bytes.h"

namespace sdio {

sdio_storage* storage_retain(const sdio_storage* storage) noexcept {
  return reinterpret_cast<sdio_storage*>(
      c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(impl_of(storage)).release());
}

void storage_release(sdio_storage* storage) noexcept {
  if (storage != nullptr) c10::intrusive_ptr<c10::StorageImpl>::reclaim(impl_of(storage)).reset();
}

}  // namespace sdio
