// The SHA-256 of a file that several threads write in any order: each hashes its own region, when its turn has come.
//
// Hashing is serial, so it bounds the speed of the whole; while one thread hashes, others copy and write. A thread
// waits for its turn with a region that is filled already. These waits end, because regions are handed out in ascending
// order.
#pragma once

#include <sys/uio.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "checksum/sha256.h"
#include "pipeline/write/read_gate.h"

namespace sdio {

class FileDigest {
 public:
  // The bytes of region `index`: `nbytes` of `pieces`, zeros where there are fewer. `gate`: passed while they are read;
  // null where nothing moves them. Any thread; throws Cancelled after cancel().
  void add(uint64_t index, const std::vector<iovec>& pieces, uint64_t nbytes, ReadGate* gate);

  void cancel();

  Sha256::Sum finish() { return hash_.finish(); }  // once, when all have been added

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t next_ = 0;
  bool cancelled_ = false;
  Sha256 hash_;  // of whoever's turn it is
};

}  // namespace sdio
