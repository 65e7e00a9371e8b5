// Ways to keep a copy of host memory that its owner goes on to overwrite: what the call costs, and what the overwriting
// costs then. docs/async.md draws the conclusion.
//
//   g++ -std=c++17 -O2 -pthread -Icsrc benchmarks/raw/snapshot_ways.cpp csrc/checksum/*.cpp -o snapshot_ways
//
// (the files of csrc/checksum that are not for this CPU compile to nothing; link libsdio_checksum.a of a build instead
// where their flags are wanted). userfaultfd needs root or vm.unprivileged_userfaultfd=1.

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "checksum/crc32.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kNbytes = size_t{1} << 30;
constexpr size_t kPieceNbytes = 8u << 20;
constexpr size_t kFaultNbytes = 256u << 10;
constexpr size_t kHugePageNbytes = 2u << 20;
constexpr int kRounds = 7;
const unsigned kThreads = std::max(1u, std::thread::hardware_concurrency());

double timed(const std::function<void()>& action) {
  const auto start = Clock::now();
  action();
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

char* map(bool huge_pages) {
  void* const mapping =
      mmap(nullptr, kNbytes + kHugePageNbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const auto address = reinterpret_cast<uintptr_t>(mapping);
  char* const aligned = static_cast<char*>(mapping) + (kHugePageNbytes - address % kHugePageNbytes);
  madvise(aligned, kNbytes, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  return aligned;
}

void in_parallel(const std::function<void(size_t offset)>& work) {
  std::vector<std::thread> threads;
  std::atomic<size_t> next{0};
  for (unsigned i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      for (size_t at = next.fetch_add(kPieceNbytes); at < kNbytes; at = next.fetch_add(kPieceNbytes)) work(at);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void overwrite(char* source) {
  in_parallel([&](size_t at) { std::memset(source + at, 7, kPieceNbytes); });
}

struct Samples {
  std::vector<double> stall, overwriting;
};

double median(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  return samples[samples.size() / 2];
}

void report(const char* way, const Samples& samples) {
  std::printf("%-32s stall %8.1f ms   overwriting %8.1f ms\n", way, median(samples.stall), median(samples.overwriting));
}

void by_copy(char* source, char* copy) {
  std::printf("the first copy                   stall %8.1f ms\n",
              timed([&] { in_parallel([&](size_t at) { std::memcpy(copy + at, source + at, kPieceNbytes); }); }));
  Samples plain, checksummed;
  for (int round = 0; round < kRounds; ++round) {
    plain.stall.push_back(
        timed([&] { in_parallel([&](size_t at) { std::memcpy(copy + at, source + at, kPieceNbytes); }); }));
    plain.overwriting.push_back(timed([&] { overwrite(source); }));
    checksummed.stall.push_back(timed([&] {
      in_parallel([&](size_t at) { static_cast<void>(sdio::crc32_copy(0, copy + at, source + at, kPieceNbytes)); });
    }));
    checksummed.overwriting.push_back(timed([&] { overwrite(source); }));
  }
  report("parallel memcpy, warm", plain);
  report("parallel crc32_copy, warm", checksummed);
}

void by_fork(char* source) {
  Samples samples;
  for (int round = 0; round < kRounds; ++round) {
    pid_t child = 0;
    samples.stall.push_back(timed([&] {
      child = fork();
      if (child == 0) {
        pause();
        _exit(0);
      }
    }));
    samples.overwriting.push_back(timed([&] { overwrite(source); }));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
  }
  report("fork, copy on write", samples);
}

void by_userfaultfd(char* source, char* copy) {
  const int fd = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  uffdio_api api = {UFFD_API, UFFD_FEATURE_PAGEFAULT_FLAG_WP, 0};
  const auto start = reinterpret_cast<uintptr_t>(source);
  uffdio_register registered = {{start, kNbytes}, UFFDIO_REGISTER_MODE_WP, 0};
  if (fd < 0 || ioctl(fd, UFFDIO_API, &api) != 0 || ioctl(fd, UFFDIO_REGISTER, &registered) != 0) {
    std::perror("userfaultfd");
    return;
  }
  std::atomic<bool> stop{false};
  std::vector<std::atomic<char>> copied(kNbytes / kFaultNbytes);
  std::vector<std::thread> handlers;
  for (unsigned i = 0; i < kThreads; ++i) {
    handlers.emplace_back([&] {
      while (!stop) {
        pollfd ready = {fd, POLLIN, 0};
        uffd_msg message;
        if (poll(&ready, 1, 5) <= 0 || read(fd, &message, sizeof message) != sizeof message) continue;
        const size_t offset = (message.arg.pagefault.address - start) / kFaultNbytes * kFaultNbytes;
        if (copied[offset / kFaultNbytes].exchange(1) != 0) continue;  // who copies it lets the writers go on
        std::memcpy(copy + offset, source + offset, kFaultNbytes);
        uffdio_writeprotect open_again = {{start + offset, kFaultNbytes}, 0};
        ioctl(fd, UFFDIO_WRITEPROTECT, &open_again);
      }
    });
  }
  Samples samples;
  for (int round = 0; round < kRounds; ++round) {
    for (auto& flag : copied) flag = 0;
    uffdio_writeprotect protect = {{start, kNbytes}, UFFDIO_WRITEPROTECT_MODE_WP};
    samples.stall.push_back(timed([&] { ioctl(fd, UFFDIO_WRITEPROTECT, &protect); }));
    samples.overwriting.push_back(timed([&] { overwrite(source); }));
  }
  stop = true;
  for (std::thread& handler : handlers) handler.join();
  close(fd);
  report("userfaultfd write protection", samples);
}

}  // namespace

int main() {
  for (const bool huge_pages : {false, true}) {
    std::printf("1 GiB in %s pages\n", huge_pages ? "huge" : "4 KiB");
    char* const source = map(huge_pages);
    char* const copy = map(true);
    for (size_t i = 0; i < kNbytes; i += 8) {
      const uint64_t word = i * 0x9E3779B97F4A7C15u;
      std::memcpy(source + i, &word, sizeof word);
    }
    by_copy(source, copy);
    by_fork(source);
    by_userfaultfd(source, copy);
    munmap(source, kNbytes);
    munmap(copy, kNbytes);
  }
}
