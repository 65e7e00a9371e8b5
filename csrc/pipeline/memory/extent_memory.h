// Memory that mirrors an extent of the file: one mapping, in which the payloads of neighbouring records lie as they do
// in the file, so that direct reads land where the tensors are.
//
// Any thread may use it. Whoever needs a part holds the whole by a shared_ptr, and gives the pages of the part back to
// the system when it is no longer needed: only address space stays until the last part is gone.
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

  // Makes the pages of the file's [begin, end) present, so that no read into them waits for memory to be cleared. Their
  // contents stay. False where the kernel (before 5.14) or the memory left does not allow it; reads work all the same.
  bool fault_in(uint64_t begin, uint64_t end);

  // Gives the memory of [data, data + nbytes) back to the system, as far as it is whole pages.
  static void release(char* data, uint64_t nbytes);

  // Until this is called, a forked child gets no copy: direct reads into pages that fork() shared could land in those
  // of the child.
  void allow_fork();

 private:
  const uint64_t file_offset_;
  const uint64_t nbytes_;
  char* data_;
};

}  // namespace sdio
