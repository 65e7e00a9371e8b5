// Bytes for the page cache, held back until no thread of this process writes past it.
//
// A buffered write has the inode to itself: it waits for the direct ones of all processes, and those that come later
// wait for it. Made one by one between direct writes, few of them would make a save much longer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "file/positional_sink.h"

namespace sdio {

class HeldWrites {
 public:
  // `sink` writes through the page cache.
  explicit HeldWrites(PositionalSink& sink) : sink_(sink) {}

  // Holds a copy of the bytes; any thread. So that memory stays bounded, all that is held is written when it is much.
  void add(uint64_t file_offset, const char* bytes, uint64_t nbytes);

  // Writes what is held; one thread, at the end.
  void flush() { write(held_); }

 private:
  struct Piece {
    uint64_t file_offset;
    std::string bytes;
  };
  struct Held {
    std::vector<Piece> pieces;
    size_t nbytes = 0;  // of memory, about
  };

  void write(const Held& held);

  PositionalSink& sink_;
  std::mutex mutex_;
  Held held_;
};

}  // namespace sdio
