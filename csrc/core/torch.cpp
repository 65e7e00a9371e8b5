#include "core/torch.h"

#include <atomic>
#include <stdexcept>
#include <utility>
#include <vector>

namespace sdio {
namespace {

std::atomic<const Torch*> in_use{nullptr};

}  // namespace

const Torch& torch() {
  const Torch* const implementation = in_use;
  if (implementation == nullptr) throw std::runtime_error("statedict_io._core has not been told how to reach torch");
  return *implementation;
}

void use(std::unique_ptr<const Torch> implementation) {
  static auto& kept = *new std::vector<std::unique_ptr<const Torch>>;
  kept.push_back(std::move(implementation));
  in_use = kept.back().get();
}

}  // namespace sdio
