// An open file as a place to put bytes at offsets, through the page cache or past it (O_DIRECT).
//
// The descriptor is the caller's: it stays open, and nobody else may write through it while the sink lives. write() may
// be called from several threads at once for ranges that do not overlap; the other methods from one thread. No zip, no
// torch.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "file/direct_io.h"

namespace sdio {

class PositionalSink {
 public:
  // kAuto: direct where the file system takes it, else buffered. kOn: throws SystemError where it is refused.
  PositionalSink(int fd, DirectIo direct_io);
  virtual ~PositionalSink();
  PositionalSink(const PositionalSink&) = delete;
  PositionalSink& operator=(const PositionalSink&) = delete;

  bool direct() const { return direct_.load(std::memory_order_relaxed); }

  // The offset, length and memory address of a direct write must be multiples of this.
  size_t alignment() const { return alignment_; }

  // Reserves blocks, so that the writes need not. Throws where the file system is full (ENOSPC, EDQUOT), and does
  // nothing where it cannot reserve any.
  void preallocate(uint64_t nbytes);

  // Writes all of `pieces`, in order, from `offset` on. Loops over short writes and EINTR. `pieces` is used up. A
  // direct write must be one aligned piece; refused with EINVAL under kAuto, it and all later writes go through the
  // page cache.
  void write(uint64_t offset, std::vector<iovec>& pieces) { write_pieces(offset, pieces.data(), pieces.size()); }
  void write(uint64_t offset, const char* bytes, uint64_t nbytes) {
    iovec piece = {const_cast<char*>(bytes), nbytes};
    write_pieces(offset, &piece, 1);
  }

  // Cuts or extends the file to `nbytes`. It may be longer, because a last direct write is padded to the alignment, or
  // shorter, because a hole at the end was never written.
  void set_nbytes(uint64_t nbytes);

 protected:
  // The system calls, overridden by tests of faults that no file system gives on demand. Each returns what the call
  // returns and sets errno.
  virtual ssize_t call_pwritev(int fd, const iovec* pieces, int count, off_t offset);
  virtual int call_fallocate(int fd, off_t nbytes);
  virtual int call_ftruncate(int fd, off_t nbytes);

 private:
  void write_pieces(uint64_t offset, iovec* pieces, size_t num_pieces);
  bool set_direct_flag(bool on);
  void fall_back_to_buffered(int error_number);

  const int fd_;
  const DirectIo wish_;
  size_t alignment_ = 4096;
  std::atomic<bool> direct_{false};
  std::mutex fall_back_mutex_;
};

}  // namespace sdio
