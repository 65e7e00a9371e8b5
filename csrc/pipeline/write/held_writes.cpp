#include "pipeline/write/held_writes.h"

#include <utility>

#include "pipeline/threads/profiled_step.h"

namespace sdio {
namespace {

constexpr size_t kMaxHeldNbytes = 8u << 20;

}  // namespace

void HeldWrites::add(uint64_t file_offset, const char* bytes, uint64_t nbytes) {
  if (nbytes == 0) return;
  Held full;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    held_.pieces.push_back({file_offset, std::string(bytes, nbytes)});
    held_.nbytes += sizeof(Piece) + nbytes;
    if (held_.nbytes >= kMaxHeldNbytes) std::swap(held_, full);
  }
  write(full);
}

void HeldWrites::write(const Held& held) {
  for (const Piece& piece : held.pieces) {
    const ProfiledStep step("statedict_io::write");
    sink_.write(piece.file_offset, piece.bytes.data(), piece.bytes.size());
  }
}

}  // namespace sdio
