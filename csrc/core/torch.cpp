#include "core/torch.h"

#include <atomic>
#include <stdexcept>

namespace sdio {
namespace {

std::atomic<const Torch*> in_use{nullptr};

}  // namespace

const Torch& torch() {
  const Torch* const implementation = in_use;
  if (implementation == nullptr) throw std::runtime_error("statedict_io._core has not been told how to reach torch");
  return *implementation;
}

void use(const Torch& implementation) { in_use = &implementation; }

}  // namespace sdio
