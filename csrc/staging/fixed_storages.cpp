#include "staging/fixed_storages.h"

#include <c10/core/StorageImpl.h>

#include <cstddef>
#include <unordered_map>

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

FixedStorages::FixedStorages(const std::vector<c10::Storage>& storages) {
  for (const c10::Storage& storage : storages) {
    c10::StorageImpl* const impl = storage.unsafeGetStorageImpl();
    const auto known = readers().find(impl);
    if (known != readers().end()) {
      ++known->second;
    } else if (impl->resizable()) {
      readers().emplace(impl, 1);
      impl->set_resizable(false);
    } else {
      continue;
    }
    storages_.push_back(storage);
  }
}

FixedStorages::~FixedStorages() {
  for (const c10::Storage& storage : storages_) {
    c10::StorageImpl* const impl = storage.unsafeGetStorageImpl();
    const auto known = readers().find(impl);
    if (known == readers().end()) continue;  // in a forked child
    if (--known->second > 0) continue;
    readers().erase(known);
    make_resizable(*impl);
  }
}

void FixedStorages::release_all() {
  for (const auto& [impl, count] : readers()) make_resizable(*impl);
  readers().clear();
}

}  // namespace sdio
