// An open file as a place to take bytes from at offsets, through the page cache or past it (O_DIRECT).
//
// The descriptor is the caller's, stays open while the source lives, and keeps its position and flags: direct reads go
// through a description of the source's own. All methods may be called from several threads at once. No zip, no torch.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stdexcept>

#include "file/direct_io.h"

namespace sdio {

// The file ended before what was to be read: cut off before, or while it was read.
struct UnexpectedEnd : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class PositionalSource {
 public:
  // kAuto: direct for what the page cache does not hold of a large file, where the file system takes it. kOn: direct
  // whenever the range allows it; read_aligned throws SystemError where it is refused.
  PositionalSource(int fd, DirectIo direct_io);
  virtual ~PositionalSource();
  PositionalSource(const PositionalSource&) = delete;
  PositionalSource& operator=(const PositionalSource&) = delete;

  uint64_t nbytes() const { return nbytes_; }  // when the source was made

  // The offset and the destination of read_aligned() must be multiples of this.
  size_t alignment() const { return alignment_; }

  // How many bytes were read past the page cache.
  uint64_t direct_nbytes() const { return direct_nbytes_.load(std::memory_order_relaxed); }

  // Reads all of [offset, offset + nbytes), through the page cache. Loops over short reads and EINTR. Throws
  // SystemError, UnexpectedEnd.
  void read(uint64_t offset, char* destination, uint64_t nbytes);

  // Whether read_aligned should be used for this range.
  bool prefers_direct(uint64_t offset, uint64_t nbytes);

  // As read(), past the page cache. The destination has room for `nbytes` rounded up to the alignment; bytes behind
  // `nbytes` may be overwritten. Where direct reads are refused (EINVAL) under kAuto, it and all later reads go
  // through the page cache.
  void read_aligned(uint64_t offset, char* destination, uint64_t nbytes);

 protected:
  // The system calls, overridden by tests of faults that no file system gives on demand. Each returns what the call
  // returns and sets errno.
  virtual int call_open_direct(int fd);
  virtual ssize_t call_pread(int fd, char* destination, size_t nbytes, off_t offset);
  virtual bool call_is_cached(int fd, uint64_t offset, uint64_t nbytes);

 private:
  bool direct_is_open();
  // What one call of pread(2) returns, which is made again where a signal interrupts it. Throws UnexpectedEnd.
  ssize_t read_once(int fd, char* destination, uint64_t nbytes, uint64_t offset);

  const int fd_;
  const DirectIo wish_;
  uint64_t nbytes_ = 0;
  size_t alignment_ = 4096;
  std::once_flag direct_opened_;
  int direct_fd_ = -1;
  std::atomic<bool> direct_{false};
  std::atomic<uint64_t> direct_nbytes_{0};
};

}  // namespace sdio
