// Keeps the memory of storages where it is while the pipeline reads it without the GIL: resize_() of one of them, in a
// callback or in another thread, raises torch's RuntimeError until then.
//
// All functions need the GIL, which guards the process's list of fixed storages.
#pragma once

#include <c10/core/Storage.h>

#include <vector>

namespace sdio {

class FixedStorages {
 public:
  explicit FixedStorages(const std::vector<c10::Storage>& storages);
  ~FixedStorages();
  FixedStorages(const FixedStorages&) = delete;
  FixedStorages& operator=(const FixedStorages&) = delete;

  // In a forked child: lets go of what the parent's threads have fixed.
  static void release_all();

 private:
  std::vector<c10::Storage> storages_;  // those that were resizable
};

}  // namespace sdio
