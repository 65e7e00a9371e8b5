#include <cstdint>

#include "torch/functions.h"
#include "torch/raw_bytes.h"

struct sdio_pinned {
  at::Tensor bytes;
};

namespace sdio {
namespace {

constexpr uintptr_t kAlignment = 4096;  // direct I/O asks for it

}  // namespace

sdio_pinned* pin(size_t nbytes, char** data) noexcept {
  try {
    const PlainDispatch plain;
    at::Tensor bytes = at::empty({static_cast<int64_t>(nbytes)},
                                 at::TensorOptions().dtype(at::kByte).device(at::kCPU).pinned_memory(true));
    if (reinterpret_cast<uintptr_t>(bytes.data_ptr()) % kAlignment != 0) return nullptr;
    *data = static_cast<char*>(bytes.data_ptr());
    return new sdio_pinned{std::move(bytes)};
  } catch (...) {  // no accelerator, or one without pinned memory
    return nullptr;
  }
}

void unpin(sdio_pinned* pinned) noexcept { delete pinned; }

}  // namespace sdio
