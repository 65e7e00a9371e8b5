#include "file/positional_sink.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "file/system_error.h"

namespace sdio {
namespace {

constexpr size_t kMaxPieces = 1024;  // IOV_MAX on Linux and macOS

}  // namespace

PositionalSink::PositionalSink(int fd, DirectIo direct_io) : fd_(fd), wish_(direct_io) {
  if (wish_ == DirectIo::kOff) return;
  const size_t alignment = direct_io_alignment(fd_);
  if (alignment != 0 && set_direct_flag(true)) {
    alignment_ = alignment;
    direct_ = true;
  } else if (wish_ == DirectIo::kOn) {
    throw SystemError(alignment != 0 ? errno : EINVAL, "O_DIRECT");
  }
}

PositionalSink::~PositionalSink() {
  if (direct()) set_direct_flag(false);
}

bool PositionalSink::set_direct_flag(bool on) {
#ifdef O_DIRECT
  const int flags = fcntl(fd_, F_GETFL);
  return flags != -1 && fcntl(fd_, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) != -1;
#else
  errno = EINVAL;
  return !on;
#endif
}

void PositionalSink::preallocate(uint64_t nbytes) {
  if (nbytes == 0) return;
  while (call_fallocate(fd_, static_cast<off_t>(nbytes)) != 0) {
    if (errno == EINTR) continue;
    if (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL) return;
    throw SystemError(errno, "fallocate");
  }
}

void PositionalSink::fall_back_to_buffered(int error_number) {
  std::lock_guard<std::mutex> lock(fall_back_mutex_);
  if (!direct()) return;  // another thread did
  if (wish_ == DirectIo::kOn || !set_direct_flag(false)) throw SystemError(error_number, "pwritev with O_DIRECT");
  direct_ = false;
}

void PositionalSink::write_pieces(uint64_t offset, iovec* pieces, size_t num_pieces) {
  for (iovec *next = pieces, *const end = pieces + num_pieces; next != end;) {
    if (next->iov_len == 0) {
      ++next;
      continue;
    }
    const bool was_direct = direct();
    const auto count = std::min(static_cast<size_t>(end - next), kMaxPieces);
    const ssize_t written = call_pwritev(fd_, next, static_cast<int>(count), static_cast<off_t>(offset));
    if (written < 0) {
      if (errno == EINTR) continue;
      if (errno == EINVAL && was_direct) {
        fall_back_to_buffered(EINVAL);
        continue;
      }
      throw SystemError(errno, "pwritev");
    }
    if (written == 0) throw SystemError(EIO, "pwritev wrote nothing");
    // A short direct write can stop between blocks, where the next one may not start.
    if (was_direct && static_cast<size_t>(written) % alignment_ != 0) fall_back_to_buffered(EIO);
    offset += static_cast<uint64_t>(written);
    for (size_t left = static_cast<size_t>(written); left != 0;) {
      const size_t taken = std::min(left, next->iov_len);
      next->iov_base = static_cast<char*>(next->iov_base) + taken;
      next->iov_len -= taken;
      left -= taken;
      if (next->iov_len == 0) ++next;
    }
  }
}

void PositionalSink::set_nbytes(uint64_t nbytes) {
  struct stat facts;
  if (fstat(fd_, &facts) == 0 && facts.st_size == static_cast<off_t>(nbytes)) return;  // no journal entry for nothing
  while (call_ftruncate(fd_, static_cast<off_t>(nbytes)) != 0) {
    if (errno != EINTR) throw SystemError(errno, "ftruncate");
  }
}

ssize_t PositionalSink::call_pwritev(int fd, const iovec* pieces, int count, off_t offset) {
  return ::pwritev(fd, pieces, count, offset);
}

int PositionalSink::call_fallocate(int fd, off_t nbytes) {
#ifdef __linux__
  return ::fallocate(fd, 0, 0, nbytes);
#else
  static_cast<void>(fd), static_cast<void>(nbytes);
  errno = EOPNOTSUPP;
  return -1;
#endif
}

int PositionalSink::call_ftruncate(int fd, off_t nbytes) { return ::ftruncate(fd, nbytes); }

}  // namespace sdio
