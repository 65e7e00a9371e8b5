#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/python_variable.h>

#include "torch/functions.h"
#include "torch/raw_bytes.h"

namespace sdio {
namespace {

// Strided, dense, on a device with storages, no lazy conjugation or negation, no wrapper, no mode: what torch reduces
// to _rebuild_tensor_v2.
bool is_plain(const at::Tensor& tensor) {
  using c10::DispatchKey;
  static const uint64_t plain_keys =
      c10::DispatchKeySet({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA,
                           DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA, DispatchKey::ADInplaceOrView})
          .raw_repr();
  return (tensor.key_set().raw_repr() & ~plain_keys) == 0 && tensor.has_storage();
}

}  // namespace

int plain_tensor(PyObject* object, sdio_plain_tensor* plain) noexcept {
  try {
    const at::Tensor& tensor = THPVariable_Unpack(object);
    if (!tensor.defined() || !is_plain(tensor)) return 0;
    plain->storage = handle_of(tensor.storage());
    plain->dtype = reinterpret_cast<PyObject*>(torch::getTHPDtype(tensor.scalar_type()));
    plain->storage_offset = tensor.storage_offset();
    plain->itemsize = static_cast<int64_t>(tensor.element_size());
    plain->num_dimensions = tensor.dim();
    plain->sizes = tensor.sizes().data();
    plain->strides = tensor.strides().data();
    plain->requires_grad = tensor.requires_grad() ? 1 : 0;
    return 1;
  } catch (...) {  // a tensor that cannot say is not plain: torch reduces it, or says why it cannot
    return 0;
  }
}

}  // namespace sdio
