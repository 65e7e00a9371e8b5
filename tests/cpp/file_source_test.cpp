// The positional source against real files, and against system calls that fail on demand.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

#include <cerrno>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "file/page_cache.h"
#include "file/positional_source.h"
#include "file/system_error.h"
#include "random_bytes.h"
#include "temporary_file.h"

namespace sdio {
namespace {

constexpr size_t kMiB = 1u << 20;

class AlignedMemory {
 public:
  explicit AlignedMemory(size_t nbytes) {
    if (posix_memalign(&data_, 4096, nbytes) != 0) throw std::bad_alloc();
  }
  ~AlignedMemory() { free(data_); }
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_ = nullptr;
};

// A source whose calls are scripted: each hook may answer instead of the kernel.
class ScriptedSource : public PositionalSource {
 public:
  using PositionalSource::PositionalSource;
  std::function<int()> on_open_direct;
  std::function<ssize_t(int, char*, size_t, off_t)> on_pread;
  bool cached = false;

 protected:
  int call_open_direct(int fd) override {
    return on_open_direct ? on_open_direct() : PositionalSource::call_open_direct(fd);
  }
  ssize_t call_pread(int fd, char* destination, size_t nbytes, off_t offset) override {
    return on_pread ? on_pread(fd, destination, nbytes, offset)
                    : PositionalSource::call_pread(fd, destination, nbytes, offset);
  }
  bool call_is_cached(int, uint64_t, uint64_t) override { return cached; }
};

ssize_t fail_with(int error_number) {
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

TEST(PositionalSource, ReadsAnyRangeFromSeveralThreads) {
  const TemporaryFile file;
  const std::string bytes = random_bytes(100000, 1);
  file.write_all(bytes);
  PositionalSource source(file.fd(), DirectIo::kAuto);
  EXPECT_EQ(source.nbytes(), bytes.size());
  std::string read(bytes.size(), '\0');
  std::vector<std::thread> threads;
  for (size_t part = 0; part < 10; ++part) {
    threads.emplace_back([&, part] { source.read(part * 10000, &read[part * 10000], 10000); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(read == bytes);
}

TEST(PositionalSource, GoesOnAfterShortReadsAndInterrupts) {
  const TemporaryFile file;
  const std::string bytes = random_bytes(1000, 1);
  file.write_all(bytes);
  ScriptedSource source(file.fd(), DirectIo::kOff);
  int calls = 0;
  source.on_pread = [&](int fd, char* destination, size_t nbytes, off_t offset) {
    return ++calls % 3 == 0 ? fail_with(EINTR) : pread(fd, destination, std::min<size_t>(nbytes, 7), offset);
  };
  std::string read(900, '\0');
  source.read(100, &read[0], 900);
  EXPECT_TRUE(read == bytes.substr(100));
}

TEST(PositionalSource, ReportsTheErrorOfARead) {
  const TemporaryFile file;
  file.write_all(random_bytes(5 * kMiB, 1));
  const AlignedMemory memory(kMiB);
  for (const int error_number : {EIO, ESTALE, EISDIR, ENOMEM}) {
    ScriptedSource source(file.fd(), DirectIo::kAuto);
    source.on_pread = [&](int, char*, size_t, off_t) { return fail_with(error_number); };
    EXPECT_EQ(error_of([&] { source.read(0, memory.data(), 10); }), error_number);
    EXPECT_EQ(error_of([&] { source.read_aligned(0, memory.data(), kMiB); }), error_number);
  }
}

TEST(PositionalSource, EndOfTheFileIsAnErrorWherever) {
  const TemporaryFile file;
  file.write_all(random_bytes(5 * kMiB + 10, 1));
  PositionalSource source(file.fd(), DirectIo::kAuto);
  const AlignedMemory memory(2 * kMiB);
  EXPECT_THROW(source.read(5 * kMiB, memory.data(), 11), UnexpectedEnd);
  EXPECT_THROW(source.read(6 * kMiB, memory.data(), 1), UnexpectedEnd);
  EXPECT_THROW(source.read_aligned(5 * kMiB, memory.data(), 11), UnexpectedEnd);
  EXPECT_THROW(source.read_aligned(6 * kMiB, memory.data(), 1), UnexpectedEnd);
  source.read_aligned(5 * kMiB, memory.data(), 10);
  ASSERT_EQ(ftruncate(file.fd(), kMiB), 0);
  EXPECT_THROW(source.read_aligned(0, memory.data(), 2 * kMiB), UnexpectedEnd);
}

TEST(PositionalSource, DirectReadsGiveTheBytesAndLeaveTheDescriptor) {
  for (const char* directory : {"/var/tmp", "/dev/shm"}) {
    const TemporaryFile file(directory);
    const std::string bytes = random_bytes(9 * kMiB + 12345, 1);
    file.write_all(bytes);
    file.make_cold();
    PositionalSource source(file.fd(), DirectIo::kAuto);
    const AlignedMemory memory(10 * kMiB);
    source.read_aligned(0, memory.data(), bytes.size());
    EXPECT_TRUE(std::string(memory.data(), bytes.size()) == bytes) << directory;
    source.read_aligned(8192, memory.data(), 5000);
    EXPECT_TRUE(std::string(memory.data(), 5000) == bytes.substr(8192, 5000)) << directory;
    EXPECT_EQ(fcntl(file.fd(), F_GETFL) & O_DIRECT, 0);
    EXPECT_EQ(lseek(file.fd(), 0, SEEK_CUR), 0);
  }
}

TEST(PositionalSource, DirectGoesToColdRangesOfLargeFiles) {
  const TemporaryFile small, large;
  small.write_all(random_bytes(kMiB, 1));
  large.write_all(random_bytes(5 * kMiB, 1));
  ScriptedSource of_small(small.fd(), DirectIo::kAuto), of_large(large.fd(), DirectIo::kAuto);
  EXPECT_FALSE(of_small.prefers_direct(0, kMiB));
  if (!of_large.prefers_direct(0, kMiB)) GTEST_SKIP() << "no direct I/O in /var/tmp";
  of_large.cached = true;
  EXPECT_FALSE(of_large.prefers_direct(0, kMiB));
  ScriptedSource off(large.fd(), DirectIo::kOff), on(large.fd(), DirectIo::kOn);
  on.cached = true;
  EXPECT_FALSE(off.prefers_direct(0, kMiB));
  EXPECT_TRUE(on.prefers_direct(0, kMiB));
}

TEST(PositionalSource, DirectRefusedAtOpenOrAtTheFirstReadGoesOnBuffered) {
  const TemporaryFile file;
  const std::string bytes = random_bytes(5 * kMiB, 1);
  file.write_all(bytes);
  const AlignedMemory memory(5 * kMiB);
  for (const bool at_open : {true, false}) {
    ScriptedSource source(file.fd(), DirectIo::kAuto);
    if (at_open) source.on_open_direct = [] { return static_cast<int>(fail_with(EINVAL)); };
    source.on_pread = [&](int fd, char* destination, size_t nbytes, off_t offset) {
      return fd != file.fd() ? fail_with(EINVAL) : pread(fd, destination, nbytes, offset);
    };
    source.read_aligned(0, memory.data(), bytes.size());
    EXPECT_TRUE(std::string(memory.data(), bytes.size()) == bytes);
    EXPECT_EQ(source.direct_nbytes(), 0u);
    EXPECT_FALSE(source.prefers_direct(0, kMiB));
  }
}

TEST(PositionalSource, DirectReadThatStopsBetweenBlocksGoesOnBuffered) {
  const TemporaryFile file;
  const std::string bytes = random_bytes(5 * kMiB, 1);
  file.write_all(bytes);
  const AlignedMemory memory(5 * kMiB);
  ScriptedSource source(file.fd(), DirectIo::kAuto);
  int direct_calls = 0;
  source.on_pread = [&](int fd, char* destination, size_t nbytes, off_t offset) {
    if (fd == file.fd()) return pread(fd, destination, nbytes, offset);
    ++direct_calls;
    return pread(file.fd(), destination, direct_calls == 1 ? 8192 : 1000, offset);
  };
  if (!source.prefers_direct(0, kMiB)) GTEST_SKIP() << "no direct I/O in /var/tmp";
  source.read_aligned(0, memory.data(), bytes.size());
  EXPECT_EQ(direct_calls, 2);
  EXPECT_TRUE(std::string(memory.data(), bytes.size()) == bytes);
}

TEST(PositionalSource, DirectWishThatCannotBeMetIsAnError) {
  const TemporaryFile file;
  file.write_all(random_bytes(10000, 1));
  const AlignedMemory memory(8192);
  std::unique_ptr<ScriptedSource> source;
  if (error_of([&] { source = std::make_unique<ScriptedSource>(file.fd(), DirectIo::kOn); }) != 0) {
    GTEST_SKIP() << "no direct I/O in /var/tmp";
  }
  source->on_open_direct = [] { return static_cast<int>(fail_with(EMFILE)); };
  EXPECT_EQ(error_of([&] { source->read_aligned(0, memory.data(), 8192); }), EMFILE);
  ScriptedSource refused(file.fd(), DirectIo::kOn);
  refused.on_pread = [&](int, char*, size_t, off_t) { return fail_with(EINVAL); };
  EXPECT_EQ(error_of([&] { refused.read_aligned(0, memory.data(), 8192); }), EINVAL);
}

TEST(PositionalSource, OfNoFileIsAnError) {
  EXPECT_EQ(error_of([] { PositionalSource(-1, DirectIo::kAuto); }), EBADF);
}

// Whether the kernel answers one of the two questions of is_cached(): about a page that has just been written.
bool kernel_tells_what_is_cached(int fd) {
#ifdef __linux__
  const uint64_t range[2] = {0, 4096};
  uint64_t counts[5];
  if (syscall(451, fd, range, counts, 0) == 0) return true;  // cachestat
#endif
#ifdef RWF_NOWAIT
  char byte;
  const iovec piece = {&byte, 1};
  return preadv2(fd, &piece, 1, 0, RWF_NOWAIT) == 1;
#else
  return false;
#endif
}

TEST(PageCache, KnowsWhatWasReadAndWhatWasDropped) {
  const TemporaryFile file;
  file.write_all(random_bytes(8 * kMiB, 1));
  if (!kernel_tells_what_is_cached(file.fd())) GTEST_SKIP() << "the kernel has neither cachestat nor RWF_NOWAIT";
  EXPECT_TRUE(is_cached(file.fd(), 0, 8 * kMiB));
  file.make_cold();
  if (is_cached(file.fd(), 0, 8 * kMiB)) GTEST_SKIP() << "/var/tmp keeps its pages";
  char byte;
  ASSERT_EQ(pread(file.fd(), &byte, 1, 4 * kMiB), 1);
  EXPECT_TRUE(is_cached(file.fd(), 4 * kMiB, 4096));
  EXPECT_FALSE(is_cached(file.fd(), 0, 8 * kMiB));
}

}  // namespace
}  // namespace sdio
