#include "pipeline/memory/extent_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#include "pipeline/memory/huge_pages.h"

namespace sdio {
namespace {

#ifdef __linux__
constexpr int kMadvPopulateWrite = 23;  // as in linux/mman.h of 5.14, which the headers of the build may not have yet
#endif

uint64_t page_nbytes() {
  static const auto nbytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return nbytes;
}

uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

ExtentMemory::ExtentMemory(uint64_t file_offset, uint64_t nbytes)
    : file_offset_(file_offset), nbytes_(round_up(nbytes, page_nbytes())) {
  const bool huge = nbytes_ >= kHugePageNbytes;
  const uint64_t mapped_nbytes = nbytes_ + (huge ? kHugePageNbytes : 0);
  if (mapped_nbytes < nbytes) throw std::bad_alloc();
  void* const mapped = mmap(nullptr, mapped_nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<char*>(mapped);
  if (huge) {
    const uint64_t before = (file_offset - reinterpret_cast<uintptr_t>(mapped)) % kHugePageNbytes;
    data_ += before;
    if (before != 0) munmap(mapped, before);
    if (before != kHugePageNbytes) munmap(data_ + nbytes_, kHugePageNbytes - before);
#ifdef MADV_HUGEPAGE
    madvise(data_, nbytes_, MADV_HUGEPAGE);
#endif
  }
#ifdef MADV_DONTFORK
  madvise(data_, nbytes_, MADV_DONTFORK);
#endif
}

ExtentMemory::~ExtentMemory() { munmap(data_, nbytes_); }

bool ExtentMemory::fault_in(uint64_t begin, uint64_t end) {
#ifdef __linux__
  char* const first = at(begin / page_nbytes() * page_nbytes());
  const auto nbytes = round_up(static_cast<uint64_t>(at(end) - first), page_nbytes());
  return madvise(first, nbytes, kMadvPopulateWrite) == 0;
#else
  static_cast<void>(begin), static_cast<void>(end);
  return false;
#endif
}

void ExtentMemory::release(char* data, uint64_t nbytes) {
  const auto begin = round_up(reinterpret_cast<uintptr_t>(data), page_nbytes());
  const auto end = (reinterpret_cast<uintptr_t>(data) + nbytes) / page_nbytes() * page_nbytes();
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

void ExtentMemory::allow_fork() {
#ifdef MADV_DOFORK
  madvise(data_, nbytes_, MADV_DOFORK);
#endif
}

}  // namespace sdio
