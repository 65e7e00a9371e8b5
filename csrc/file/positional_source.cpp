#include "file/positional_source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>

#include "file/page_cache.h"
#include "file/system_error.h"

namespace sdio {
namespace {

constexpr size_t kMaxReadNbytes = 1u << 30;  // Linux reads at most 2 GiB - 4 KiB a call
// A smaller file is read ahead by the kernel in one go, and stays in the page cache for the next reader.
constexpr uint64_t kDirectFromNbytes = 4u << 20;

#ifdef O_DIRECT
// `fd`, or a copy of it in its place that nobody takes for standard input, output or error. Leaves errno.
int above_standard(int fd) {
  if (fd < 0 || fd > 2) return fd;
  const int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  const int error_number = errno;
  close(fd);
  errno = error_number;
  return copy;
}
#endif

}  // namespace

PositionalSource::PositionalSource(int fd, DirectIo direct_io) : fd_(fd), wish_(direct_io) {
  struct stat facts;
  if (fstat(fd_, &facts) != 0) throw SystemError(errno, "fstat");
  nbytes_ = static_cast<uint64_t>(facts.st_size);
  const bool wanted = wish_ == DirectIo::kOn || (wish_ == DirectIo::kAuto && nbytes_ >= kDirectFromNbytes);
  const size_t alignment = wanted ? direct_io_alignment(fd_) : 0;
  if (alignment != 0) {
    alignment_ = alignment;
    direct_ = true;
  } else if (wish_ == DirectIo::kOn) {
    throw SystemError(EINVAL, "O_DIRECT");
  }
}

PositionalSource::~PositionalSource() {
  if (direct_fd_ >= 0) close(direct_fd_);
}

ssize_t PositionalSource::read_once(int fd, char* destination, uint64_t nbytes, uint64_t offset) {
  ssize_t taken = -1;
  do {
    taken = call_pread(fd, destination, nbytes, static_cast<off_t>(offset));
  } while (taken < 0 && errno == EINTR);
  if (taken == 0) {
    throw UnexpectedEnd("the file ends at or before offset " + std::to_string(offset) + " and had " +
                        std::to_string(nbytes_) + " bytes when it was opened");
  }
  return taken;
}

void PositionalSource::read(uint64_t offset, char* destination, uint64_t nbytes) {
  while (nbytes != 0) {
    const size_t wanted = std::min<uint64_t>(nbytes, kMaxReadNbytes);
    const ssize_t taken = read_once(fd_, destination, wanted, offset);
    if (taken < 0) throw SystemError(errno, "pread");
    offset += static_cast<uint64_t>(taken);
    destination += taken;
    nbytes -= static_cast<uint64_t>(taken);
  }
}

bool PositionalSource::direct_is_open() {
  if (!direct_) return false;
  std::call_once(direct_opened_, [this] {
    direct_fd_ = call_open_direct(fd_);
    if (direct_fd_ >= 0) return;
    if (wish_ == DirectIo::kOn) throw SystemError(errno, "open with O_DIRECT");
    direct_ = false;
  });
  return direct_;
}

bool PositionalSource::prefers_direct(uint64_t offset, uint64_t nbytes) {
  if (!direct_ || (wish_ != DirectIo::kOn && call_is_cached(fd_, offset, nbytes))) return false;
  return direct_is_open();
}

void PositionalSource::read_aligned(uint64_t offset, char* destination, uint64_t nbytes) {
  const uint64_t end = offset + nbytes;
  while (offset < end && direct_is_open()) {
    const uint64_t blocks = (std::min<uint64_t>(end - offset, kMaxReadNbytes) + alignment_ - 1) / alignment_;
    const ssize_t taken = read_once(direct_fd_, destination, blocks * alignment_, offset);
    if (taken < 0) {
      if ((errno == EINVAL || errno == EOPNOTSUPP) && wish_ != DirectIo::kOn) {
        direct_ = false;
        break;
      }
      throw SystemError(errno, "pread with O_DIRECT");
    }
    direct_nbytes_ += static_cast<uint64_t>(taken);
    offset += static_cast<uint64_t>(taken);
    destination += taken;
    if (static_cast<size_t>(taken) % alignment_ != 0) break;  // the file's end, or a read that stopped between blocks
  }
  if (offset < end) read(offset, destination, end - offset);
}

ssize_t PositionalSource::call_pread(int fd, char* destination, size_t nbytes, off_t offset) {
  return ::pread(fd, destination, nbytes, offset);
}

bool PositionalSource::call_is_cached(int fd, uint64_t offset, uint64_t nbytes) {
  return is_cached(fd, offset, nbytes);
}

int PositionalSource::call_open_direct(int fd) {
#ifdef O_DIRECT
  // The file behind the descriptor, even if it was renamed or unlinked since.
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  return above_standard(::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
#else
  static_cast<void>(fd);
  errno = EINVAL;
  return -1;
#endif
}

}  // namespace sdio
