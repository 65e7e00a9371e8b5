// A file that is gone when the test is.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string>

#include "file/system_error.h"

namespace sdio {

class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& directory = "/var/tmp") : path_(directory + "/sdio-test-XXXXXX") {
    fd_ = mkstemp(&path_[0]);
    if (fd_ < 0) throw SystemError(errno, "mkstemp");
  }
  ~TemporaryFile() {
    close(fd_);
    unlink(path_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  int fd() const { return fd_; }
  const std::string& path() const { return path_; }

  void write_all(const std::string& bytes) const {
    ASSERT_EQ(ftruncate(fd_, 0), 0);
    ASSERT_EQ(pwrite(fd_, bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
  }

  std::string read_all() const {
    // Through a description of its own: a sink may have left O_DIRECT on the other.
    const int fd = open(path_.c_str(), O_RDONLY);
    struct stat facts;
    fstat(fd, &facts);
    std::string bytes(static_cast<size_t>(facts.st_size), '\0');
    EXPECT_EQ(pread(fd, &bytes[0], bytes.size(), 0), facts.st_size);
    close(fd);
    return bytes;
  }

  // Writes it back and drops it from the page cache, as far as the file system has one.
  void make_cold() const {
    fsync(fd_);
    posix_fadvise(fd_, 0, 0, POSIX_FADV_DONTNEED);
  }

 private:
  std::string path_;
  int fd_;
};

}  // namespace sdio
