// What the file system, the device and first-touched memory allow a load: no format, no checksum.
//
//   raw_read (--direct | --buffered) [--threads N] [--chunk BYTES] (--path FILE | --serve)
//
// Reads the whole file into freshly mapped private memory with MADV_HUGEPAGE: faulting the destination in is part of
// any load. Prints one JSON object per read: seconds until every byte is there. --serve reads one path per line from
// stdin. Exit status, one-shot: 0 read, 1 failed, 2 bad arguments, 3 O_DIRECT refused.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t kAlignment = 4096;
constexpr std::size_t kHugePage = 2u << 20;

struct Options {
  bool direct = false;
  bool serve = false;
  int threads = 1;
  std::size_t chunk_nbytes = 8u << 20;
  std::string path;
};

struct DirectRefused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

struct Descriptor {
  explicit Descriptor(int descriptor) : fd(descriptor) {}
  ~Descriptor() {
    if (fd >= 0) close(fd);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int fd;
};

class FreshMemory {
 public:
  explicit FreshMemory(std::size_t nbytes) : mapped_nbytes_(round_up(nbytes, kHugePage) + kHugePage) {
    mapped_ = mmap(nullptr, mapped_nbytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED) fail("mmap");
    data_ = reinterpret_cast<char*>(round_up(reinterpret_cast<std::uintptr_t>(mapped_), kHugePage));
    madvise(data_, mapped_nbytes_ - kHugePage, MADV_HUGEPAGE);
  }
  ~FreshMemory() { munmap(mapped_, mapped_nbytes_); }
  FreshMemory(const FreshMemory&) = delete;
  FreshMemory& operator=(const FreshMemory&) = delete;
  char* data() const { return data_; }

 private:
  std::size_t mapped_nbytes_;
  void* mapped_;
  char* data_;
};

void read_fully(int fd, char* data, std::size_t nbytes, std::size_t needed, std::size_t offset) {
  std::size_t done = 0;
  while (done < needed) {
    const ssize_t taken = pread(fd, data + done, nbytes - done, static_cast<off_t>(offset + done));
    if (taken < 0) {
      if (errno == EINTR) continue;
      fail("pread");
    }
    if (taken == 0) throw std::runtime_error("the file became shorter");
    done += static_cast<std::size_t>(taken);
  }
}

std::string read_once(const Options& options, const std::string& path) {
  const auto start = std::chrono::steady_clock::now();
  const Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | (options.direct ? O_DIRECT : 0)));
  if (file.fd < 0) {
    if (options.direct && (errno == EINVAL || errno == EOPNOTSUPP)) throw DirectRefused("O_DIRECT refused at open");
    fail("open " + path);
  }
  struct stat facts;
  if (fstat(file.fd, &facts) != 0) fail("fstat");
  const auto total = static_cast<std::size_t>(facts.st_size);
  const FreshMemory memory(total);
  std::atomic<std::size_t> next{0};
  std::atomic<bool> failed{false};
  std::string message;
  auto work = [&] {
    try {
      for (std::size_t at = next.fetch_add(options.chunk_nbytes); at < total && !failed;
           at = next.fetch_add(options.chunk_nbytes)) {
        const std::size_t needed = std::min(options.chunk_nbytes, total - at);
        read_fully(file.fd, memory.data() + at, options.direct ? round_up(needed, kAlignment) : needed, needed, at);
      }
    } catch (const std::exception& error) {
      if (!failed.exchange(true)) message = error.what();
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < options.threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& thread : others) thread.join();
  if (failed) throw std::runtime_error(message);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  char line[128];
  std::snprintf(line, sizeof line, R"({"read_s": %.6f, "nbytes": %zu})", seconds, total);
  return line;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    auto value = [&]() -> std::string {
      if (++i >= argc) throw std::invalid_argument(name + " needs a value");
      return argv[i];
    };
    if (name == "--direct")
      options.direct = true;
    else if (name == "--buffered")
      options.direct = false;
    else if (name == "--serve")
      options.serve = true;
    else if (name == "--threads")
      options.threads = std::stoi(value());
    else if (name == "--chunk")
      options.chunk_nbytes = std::stoull(value());
    else if (name == "--path")
      options.path = value();
    else
      throw std::invalid_argument("unknown option " + name);
  }
  if (!options.serve && options.path.empty()) throw std::invalid_argument("--path FILE or --serve is needed");
  if (options.threads < 1 || options.chunk_nbytes == 0 || options.chunk_nbytes % kAlignment != 0) {
    throw std::invalid_argument("--threads must be positive and --chunk a multiple of 4096");
  }
  return options;
}

std::string json_string(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out + '"';
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  try {
    options = parse(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "raw_read: " << error.what() << '\n';
    return 2;
  }
  int status = 0;
  auto read_and_print = [&](const std::string& path) {
    try {
      std::cout << read_once(options, path) << std::endl;
      status = 0;
    } catch (const DirectRefused& refused) {
      std::cout << "{\"unsupported\": " << json_string(refused.what()) << "}" << std::endl;
      status = 3;
    } catch (const std::exception& error) {
      std::cout << "{\"error\": " << json_string(error.what()) << "}" << std::endl;
      status = 1;
    }
  };
  if (!options.serve) {
    read_and_print(options.path);
    return status;
  }
  std::cout << "{\"ready\": \"ready\"}" << std::endl;
  for (std::string path; std::getline(std::cin, path);) read_and_print(path);
  return 0;
}
