// Storages whose memory is read without the GIL. Torch keeps the memory where it is; where torch cannot be told to, a
// change is noticed before what was written counts.
//
// All methods need the GIL, but for gate().
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/torch.h"
#include "pipeline/write/read_gate.h"

namespace sdio {

// Throws where `storage` no longer has the `nbytes` of the plan, or where they are no longer at `data`, unless that is
// null: then they are not read in place. `name()` is what the error calls the storage.
template <typename Name>
void check_unmoved(const Storage& storage, const char* data, uint64_t nbytes, const Name& name) {
  const StorageBytes now = storage.bytes();
  if (now.nbytes == nbytes && (data == nullptr || now.data == data)) return;
  throw std::runtime_error(name() + " was resized or moved while it was being saved: it had " + std::to_string(nbytes) +
                           " bytes, now it has " + std::to_string(now.nbytes));
}

class KeptStorages {
 public:
  // `check` throws where a storage's memory is not what was planned; it is called here first.
  KeptStorages(const std::vector<Storage>& storages, std::function<void()> check) : check_(std::move(check)) {
    check_();
    if (storages.empty()) return;
    fixed_ = storages.front().torch().fix(storages);
    may_move_ = fixed_ == nullptr;
  }

  bool may_move() const { return may_move_; }

  // Readers pass it, so that they pause while Python code runs; null where nothing can move.
  ReadGate* gate() { return may_move_ ? &gate_ : nullptr; }

  // To be called after Python code has run, and at the end.
  void check() const {
    if (may_move_) check_();
  }

 private:
  const std::function<void()> check_;
  std::unique_ptr<FixedStorages> fixed_;
  bool may_move_ = false;
  ReadGate gate_;
};

}  // namespace sdio
