// Memory that mirrors an extent of the file: one mapping, in which the payloads of neighbouring records lie as they do
// in the file, so that direct reads land where the tensors are.
//
// Any thread. Whoever holds a part holds the whole by a shared_ptr, and gives the part's pages back when done with it:
// that address space outlives its memory is what makes neighbours independent.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sdio {

class ExtentMemory {
 public:
  // Mirrors [file_offset, file_offset + nbytes) in private anonymous memory, with addresses that are congruent to the
  // file's offsets modulo a huge page. `file_offset` is a multiple of the page size. Throws std::bad_alloc.
  ExtentMemory(uint64_t file_offset, uint64_t nbytes);
  ~ExtentMemory();
  ExtentMemory(const ExtentMemory&) = delete;
  ExtentMemory& operator=(const ExtentMemory&) = delete;

  uint64_t nbytes() const { return nbytes_; }
  char* at(uint64_t file_offset) const { return data_ + (file_offset - file_offset_); }

  // Makes the pages of the file's [begin, end) present, so that no read into them waits for memory to be cleared. Keeps
  // what is in them. False where the kernel (before 5.14) or the memory left does not allow it: the reads will see.
  bool fault_in(uint64_t begin, uint64_t end);

  // Gives the memory of [data, data + nbytes) back to the system, as far as it is whole pages.
  static void release(char* data, uint64_t nbytes);

  // While it is filled, a forked child gets no copy: direct reads into pages that fork() shared may land in the
  // child's.
  void allow_fork();

 private:
  const uint64_t file_offset_;
  const uint64_t nbytes_;
  char* data_;
};

}  // namespace sdio
