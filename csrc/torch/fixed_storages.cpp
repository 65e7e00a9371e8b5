// Storages that keep their memory where it is while the pipeline reads it without the GIL: resize_() of one of them, in
// a callback or in another thread, raises torch's RuntimeError until then. The GIL guards the process's list of them.
#include <Python.h>

#include <cstddef>
#include <memory>
#include <new>
#include <unordered_map>
#include <vector>

#include "torch/functions.h"
#include "torch/raw_bytes.h"

namespace sdio {
namespace {

void make_resizable(c10::StorageImpl& storage) {
  if (storage.allocator() != nullptr) storage.set_resizable(true);  // none: it went to shared memory meanwhile
}

// How many saves read each: the last one makes it resizable again. Never destroyed: threads may outlive it.
std::unordered_map<c10::StorageImpl*, size_t>& readers() {
  static auto& counts = *new std::unordered_map<c10::StorageImpl*, size_t>();
  return counts;
}

}  // namespace
}  // namespace sdio

struct sdio_fixed {
  explicit sdio_fixed(size_t num_storages) { storages.reserve(num_storages); }
  sdio_fixed(const sdio_fixed&) = delete;
  sdio_fixed& operator=(const sdio_fixed&) = delete;

  ~sdio_fixed() {
    for (const c10::Storage& storage : storages) {
      c10::StorageImpl* const impl = storage.unsafeGetStorageImpl();
      const auto known = sdio::readers().find(impl);
      if (known == sdio::readers().end()) continue;  // in a forked child
      if (--known->second > 0) continue;
      sdio::readers().erase(known);
      sdio::make_resizable(*impl);
    }
  }

  void add(const sdio_storage* storage) {
    c10::StorageImpl* const impl = sdio::impl_of(storage);
    const auto known = sdio::readers().find(impl);
    if (known != sdio::readers().end()) {
      ++known->second;
    } else if (impl->resizable()) {
      sdio::readers().emplace(impl, 1);
      impl->set_resizable(false);
    } else {
      return;
    }
    storages.push_back(sdio::shared(storage));
  }

  std::vector<c10::Storage> storages;  // those that were resizable
};

namespace sdio {

sdio_fixed* fix(sdio_storage* const* storages, size_t num_storages) noexcept {
  try {
    auto fixed = std::make_unique<sdio_fixed>(num_storages);
    for (size_t i = 0; i < num_storages; ++i) fixed->add(storages[i]);
    return fixed.release();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
    return nullptr;
  }
}

void unfix(sdio_fixed* fixed) noexcept { delete fixed; }

void forget_fixed() noexcept {
  for (const auto& [impl, count] : readers()) make_resizable(*impl);
  readers().clear();
}

}  // namespace sdio
