// Storages as handles, ranges of them and of host memory as byte tensors, and the dispatch under which they are copied.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/Storage.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/intrusive_ptr.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "boundary/torch_functions.h"

namespace sdio {

inline c10::StorageImpl* impl_of(const sdio_storage* handle) {
  return reinterpret_cast<c10::StorageImpl*>(const_cast<sdio_storage*>(handle));
}

inline const sdio_storage* handle_of(const c10::Storage& storage) {
  return reinterpret_cast<const sdio_storage*>(storage.unsafeGetStorageImpl());
}

// One more owner.
inline c10::Storage shared(const sdio_storage* handle) {
  return c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(impl_of(handle)));
}

// Bytes of a storage on a device; no storage: the record is not on a device.
struct DeviceBytes {
  c10::Storage storage;
  uint64_t offset = 0;  // of the first byte in it
  uint64_t nbytes = 0;
};

inline std::vector<DeviceBytes> shared(const sdio_device_bytes* records, size_t num_records) {
  std::vector<DeviceBytes> held(num_records);
  for (size_t record = 0; record < num_records; ++record) {
    const sdio_device_bytes& bytes = records[record];
    if (bytes.storage != nullptr) held[record] = {shared(bytes.storage), bytes.offset, bytes.nbytes};
  }
  return held;
}

// Bytes are copied below autograd and below any Python dispatch mode of the calling thread.
class PlainDispatch {
 private:
  c10::InferenceMode inference_mode_;
  c10::impl::ExcludeDispatchKeyGuard no_python_{
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot})};
};

inline at::Tensor device_bytes(const c10::Storage& storage, uint64_t offset, uint64_t nbytes) {
  return at::empty({0}, at::TensorOptions().dtype(at::kByte).device(storage.device()))
      .set_(storage, static_cast<int64_t>(offset), {static_cast<int64_t>(nbytes)}, {1});
}

inline at::Tensor host_bytes(char* data, uint64_t nbytes) {
  return at::from_blob(data, {static_cast<int64_t>(nbytes)}, at::TensorOptions().dtype(at::kByte));
}

}  // namespace sdio
