// The positional sink against real files, and against system calls that fail on demand.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "file/positional_sink.h"
#include "file/system_error.h"
#include "temporary_file.h"

namespace sdio {
namespace {

class AlignedBytes {
 public:
  explicit AlignedBytes(size_t nbytes) : nbytes_(nbytes) {
    if (posix_memalign(&data_, 4096, nbytes) != 0) throw std::bad_alloc();
    for (size_t i = 0; i < nbytes; ++i) static_cast<char*>(data_)[i] = static_cast<char>(i * 31 + i / 251);
  }
  ~AlignedBytes() { free(data_); }
  char* data() const { return static_cast<char*>(data_); }
  std::string text() const { return std::string(data(), nbytes_); }

 private:
  void* data_ = nullptr;
  size_t nbytes_;
};

// A sink whose calls are scripted: each hook may answer instead of the kernel.
class ScriptedSink : public PositionalSink {
 public:
  using PositionalSink::PositionalSink;
  std::function<ssize_t(const iovec*, int, off_t)> on_pwritev;
  std::function<int()> on_fallocate;
  std::function<int()> on_ftruncate;

 protected:
  ssize_t call_pwritev(int fd, const iovec* pieces, int count, off_t offset) override {
    return on_pwritev ? on_pwritev(pieces, count, offset) : PositionalSink::call_pwritev(fd, pieces, count, offset);
  }
  int call_fallocate(int fd, off_t nbytes) override {
    return on_fallocate ? on_fallocate() : PositionalSink::call_fallocate(fd, nbytes);
  }
  int call_ftruncate(int fd, off_t nbytes) override {
    return on_ftruncate ? on_ftruncate() : PositionalSink::call_ftruncate(fd, nbytes);
  }
};

int fail_with(int error_number) {
  errno = error_number;
  return -1;
}

int error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const SystemError& e) {
    return e.error_number();
  }
  return 0;
}

TEST(PositionalSink, WritesPiecesAtTheirOffsetFromSeveralThreads) {
  const TemporaryFile file;
  PositionalSink sink(file.fd(), DirectIo::kOff);
  std::string expected(64 * 1000, '\0');
  std::vector<std::thread> threads;
  for (int part = 0; part < 8; ++part) {
    for (int i = 0; i < 8000; ++i) expected[static_cast<size_t>(part * 8000 + i)] = static_cast<char>(part * 17 + i);
    threads.emplace_back([&, part] {
      char* begin = &expected[static_cast<size_t>(part) * 8000];
      std::vector<iovec> pieces = {{begin, 3}, {begin + 3, 0}, {begin + 3, 7997}};
      sink.write(static_cast<uint64_t>(part) * 8000, pieces);
    });
  }
  for (std::thread& thread : threads) thread.join();
  sink.set_nbytes(expected.size());
  EXPECT_TRUE(file.read_all() == expected);
}

TEST(PositionalSink, TakesMorePiecesThanOneCallMay) {
  const TemporaryFile file;
  PositionalSink sink(file.fd(), DirectIo::kOff);
  std::string bytes(5000, '\0');
  std::vector<iovec> pieces;
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<char>(i);
    pieces.push_back({&bytes[i], 1});
  }
  sink.write(10, pieces);
  EXPECT_EQ(file.read_all().substr(10), bytes);
}

TEST(PositionalSink, GoesOnAfterShortWritesAndInterrupts) {
  const TemporaryFile file;
  ScriptedSink sink(file.fd(), DirectIo::kOff);
  int calls = 0;
  sink.on_pwritev = [&](const iovec* pieces, int, off_t offset) -> ssize_t {
    if (++calls % 3 == 0) return fail_with(EINTR);
    return pwrite(file.fd(), pieces[0].iov_base, std::min<size_t>(pieces[0].iov_len, 7), offset);
  };
  std::string bytes = "the quick brown fox jumps over the lazy dog";
  std::vector<iovec> pieces = {{&bytes[0], 10}, {&bytes[10], bytes.size() - 10}};
  sink.write(0, pieces);
  EXPECT_EQ(file.read_all(), bytes);
}

TEST(PositionalSink, ReportsTheErrorOfAWrite) {
  const TemporaryFile file;
  for (const int error_number : {EIO, ENOSPC, EDQUOT, ESTALE, EFBIG}) {
    ScriptedSink sink(file.fd(), DirectIo::kOff);
    sink.on_pwritev = [&](const iovec*, int, off_t) { return static_cast<ssize_t>(fail_with(error_number)); };
    char byte = 1;
    std::vector<iovec> pieces = {{&byte, 1}};
    EXPECT_EQ(error_of([&] { sink.write(0, pieces); }), error_number);
    sink.on_ftruncate = [&] { return fail_with(error_number); };
    EXPECT_EQ(error_of([&] { sink.set_nbytes(99); }), error_number);
  }
}

TEST(PositionalSink, AFileSystemWithoutPreallocationIsNoErrorAFullOneIs) {
  const TemporaryFile file;
  ScriptedSink sink(file.fd(), DirectIo::kOff);
  for (const int error_number : {EOPNOTSUPP, ENOSYS, EINVAL}) {
    sink.on_fallocate = [&] { return fail_with(error_number); };
    EXPECT_EQ(error_of([&] { sink.preallocate(100); }), 0);
  }
  for (const int error_number : {ENOSPC, EDQUOT, EIO}) {
    sink.on_fallocate = [&] { return fail_with(error_number); };
    EXPECT_EQ(error_of([&] { sink.preallocate(100); }), error_number);
  }
}

TEST(PositionalSink, TmpfsOrDiskUnderAutoTakesTheBytes) {
  for (const char* directory : {"/var/tmp", "/dev/shm"}) {
    const TemporaryFile file(directory);
    PositionalSink sink(file.fd(), DirectIo::kAuto);
    const AlignedBytes bytes(1 << 16);
    std::vector<iovec> pieces = {{bytes.data(), 1 << 16}};
    sink.preallocate(1 << 16);
    sink.write(0, pieces);
    sink.set_nbytes(60001);
    EXPECT_TRUE(file.read_all() == bytes.text().substr(0, 60001)) << directory;
  }
}

TEST(PositionalSink, DirectWriteRefusedAtTheFirstWriteGoesOnBuffered) {
  const TemporaryFile file;
  ScriptedSink sink(file.fd(), DirectIo::kAuto);
  if (!sink.direct()) GTEST_SKIP() << "no direct I/O in /var/tmp";
  sink.on_pwritev = [&](const iovec* pieces, int count, off_t offset) -> ssize_t {
    return sink.direct() ? fail_with(EINVAL) : pwritev(file.fd(), pieces, count, offset);
  };
  const AlignedBytes bytes(8192);
  std::vector<iovec> pieces = {{bytes.data(), 8192}};
  sink.write(0, pieces);
  EXPECT_FALSE(sink.direct());
  EXPECT_EQ(fcntl(file.fd(), F_GETFL) & O_DIRECT, 0);
  EXPECT_TRUE(file.read_all() == bytes.text());
}

TEST(PositionalSink, DirectWriteThatStopsBetweenBlocksGoesOnBuffered) {
  const TemporaryFile file;
  ScriptedSink sink(file.fd(), DirectIo::kAuto);
  if (!sink.direct()) GTEST_SKIP() << "no direct I/O in /var/tmp";
  const AlignedBytes bytes(8192);
  int calls = 0;
  sink.on_pwritev = [&](const iovec* pieces, int count, off_t offset) -> ssize_t {
    if (++calls > 1) return pwritev(file.fd(), pieces, count, offset);
    const int buffered = dup(file.fd());
    fcntl(buffered, F_SETFL, fcntl(buffered, F_GETFL) & ~O_DIRECT);
    const ssize_t written = pwrite(buffered, pieces[0].iov_base, 1000, offset);
    close(buffered);
    return written;
  };
  std::vector<iovec> pieces = {{bytes.data(), 8192}};
  sink.write(0, pieces);
  EXPECT_TRUE(file.read_all() == bytes.text());
}

TEST(PositionalSink, DirectWishThatCannotBeMetIsAnError) {
  const TemporaryFile file;
  ScriptedSink sink(file.fd(), DirectIo::kAuto);
  if (!sink.direct()) GTEST_SKIP() << "no direct I/O in /var/tmp";
  ScriptedSink insisting(file.fd(), DirectIo::kOn);
  insisting.on_pwritev = [&](const iovec*, int, off_t) { return static_cast<ssize_t>(fail_with(EINVAL)); };
  const AlignedBytes bytes(4096);
  std::vector<iovec> pieces = {{bytes.data(), 4096}};
  EXPECT_EQ(error_of([&] { insisting.write(0, pieces); }), EINVAL);
}

TEST(PositionalSink, LeavesTheDescriptorBuffered) {
  const TemporaryFile file;
  {
    const PositionalSink sink(file.fd(), DirectIo::kAuto);
  }
  EXPECT_EQ(fcntl(file.fd(), F_GETFL) & O_DIRECT, 0);
}

}  // namespace
}  // namespace sdio
