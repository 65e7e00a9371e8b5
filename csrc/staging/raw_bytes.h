// Ranges of storages and of host memory as byte tensors, and the dispatch under which they are copied.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/Storage.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>

namespace sdio {

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
