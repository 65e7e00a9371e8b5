// What the file system and device allow: random bytes, preallocated file, no format.
//
//   raw_write (--direct | --buffered) --size BYTES [--threads N] [--chunk BYTES] [--source BYTES]
//             [--fsync] [--fsync-directory] (--path FILE | --serve)
//
// Prints one JSON object per write: seconds until the writes returned and until they are on the device. Both include
// creating and preallocating the file, which any saver of a new file has to do; prepare_s tells that part alone.
// --serve reads one path per line from stdin and keeps the buffers between writes: filling them is not timed.
// Exit status, one-shot: 0 written, 1 failed, 2 bad arguments, 3 O_DIRECT refused.

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
#include <cstdlib>
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
  bool fsync = false;
  bool fsync_directory = false;
  int threads = 1;
  std::size_t chunk_nbytes = 8u << 20;
  std::size_t size_nbytes = 0;
  std::size_t source_nbytes = 0;  // 0: one chunk per thread
  std::string path;
};

struct DirectRefused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

[[noreturn]] void fail(const std::string& what, int error = errno) {
  throw std::runtime_error(what + ": " + std::strerror(error));
}

// Huge-page memory filled with random bytes, cut into chunks that writers take turns with. Never freed.
class RandomSource {
 public:
  explicit RandomSource(std::size_t nbytes) : nbytes_(round_up(nbytes, kHugePage)) {
    void* raw = mmap(nullptr, nbytes_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) fail("mmap");
    data_ = reinterpret_cast<char*>(round_up(reinterpret_cast<std::uintptr_t>(raw), kHugePage));
    madvise(data_, nbytes_, MADV_HUGEPAGE);
    std::uint64_t state = 0x9e3779b97f4a7c15ull ^ static_cast<std::uint64_t>(getpid());
    auto* words = reinterpret_cast<std::uint64_t*>(data_);
    for (std::size_t i = 0; i < nbytes_ / 8; ++i) {  // xorshift64
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      words[i] = state;
    }
  }
  const char* chunk(std::size_t index, std::size_t chunk_nbytes) const {
    const std::size_t chunks = std::max<std::size_t>(1, nbytes_ / chunk_nbytes);
    return data_ + index % chunks * chunk_nbytes;
  }

 private:
  std::size_t nbytes_;
  char* data_;
};

// RAII for a descriptor: an error on the way must not leak it while serving.
struct Descriptor {
  explicit Descriptor(int descriptor) : fd(descriptor) {}
  ~Descriptor() {
    if (fd >= 0) close(fd);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int fd;
};

void write_fully(int fd, const char* data, std::size_t nbytes, std::size_t offset) {
  while (nbytes > 0) {
    const ssize_t written = pwrite(fd, data, nbytes, static_cast<off_t>(offset));
    if (written < 0) {
      if (errno == EINTR) continue;
      fail("pwrite");
    }
    data += written;
    offset += static_cast<std::size_t>(written);
    nbytes -= static_cast<std::size_t>(written);
  }
}

void write_all_chunks(int fd, const Options& options, const RandomSource& source, std::size_t total) {
  std::atomic<std::size_t> next{0};
  std::atomic<bool> failed{false};
  std::string message;
  const std::size_t chunks = (total + options.chunk_nbytes - 1) / options.chunk_nbytes;
  auto work = [&] {
    try {
      for (std::size_t i = next++; i < chunks && !failed; i = next++) {
        const std::size_t offset = i * options.chunk_nbytes;
        const std::size_t nbytes = std::min(options.chunk_nbytes, total - offset);
        write_fully(fd, source.chunk(i, options.chunk_nbytes), nbytes, offset);
      }
    } catch (const std::exception& error) {
      if (!failed.exchange(true)) message = error.what();
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < std::min<int>(options.threads, static_cast<int>(std::max<std::size_t>(1, chunks))); ++i) {
    others.emplace_back(work);
  }
  work();
  for (auto& thread : others) thread.join();
  if (failed) throw std::runtime_error(message);
}

void fsync_parent(const std::string& path) {
  const auto slash = path.rfind('/');
  const std::string parent = slash == std::string::npos ? "." : path.substr(0, std::max<std::size_t>(1, slash));
  Descriptor directory(open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory.fd < 0 || fsync(directory.fd) != 0) fail("fsync " + parent);
}

std::string write_once(const Options& options, const RandomSource& source, const std::string& path) {
  const auto start = std::chrono::steady_clock::now();
  const int flags = O_WRONLY | O_CREAT | O_CLOEXEC | (options.direct ? O_DIRECT : 0);
  Descriptor file(open(path.c_str(), flags, 0666));
  if (file.fd < 0) {
    if (options.direct && (errno == EINVAL || errno == EOPNOTSUPP)) throw DirectRefused("O_DIRECT refused at open");
    fail("open " + path);
  }
  const std::size_t total = options.direct ? round_up(options.size_nbytes, kAlignment) : options.size_nbytes;
  if (total > 0) {
    const int error = posix_fallocate(file.fd, 0, static_cast<off_t>(total));
    if (error != 0) fail("posix_fallocate", error);
  }
  const double prepared = seconds_since(start);
  write_all_chunks(file.fd, options, source, total);
  if (ftruncate(file.fd, static_cast<off_t>(options.size_nbytes)) != 0) fail("ftruncate");
  const double returned = seconds_since(start);
  if (options.fsync && fsync(file.fd) != 0) fail("fsync");
  if (options.fsync_directory) fsync_parent(path);
  const double durable = seconds_since(start);
  char line[256];
  std::snprintf(line, sizeof line, R"({"prepare_s": %.6f, "return_s": %.6f, "durable_s": %s, "nbytes": %zu})", prepared,
                returned, options.fsync ? std::to_string(durable).c_str() : "null", options.size_nbytes);
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
    else if (name == "--fsync")
      options.fsync = true;
    else if (name == "--fsync-directory")
      options.fsync_directory = true;
    else if (name == "--threads")
      options.threads = std::stoi(value());
    else if (name == "--chunk")
      options.chunk_nbytes = std::stoull(value());
    else if (name == "--size")
      options.size_nbytes = std::stoull(value());
    else if (name == "--source")
      options.source_nbytes = std::stoull(value());
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
    std::cerr << "raw_write: " << error.what() << '\n';
    return 2;
  }
  const std::size_t ring = static_cast<std::size_t>(options.threads) * options.chunk_nbytes;
  const RandomSource source(std::max(round_up(options.source_nbytes, options.chunk_nbytes), ring));
  int status = 0;
  auto write_and_print = [&](const std::string& path) {
    try {
      std::cout << write_once(options, source, path) << std::endl;
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
    write_and_print(options.path);
    return status;
  }
  std::cout << "{\"ready\": \"ready\"}" << std::endl;
  for (std::string path; std::getline(std::cin, path);) write_and_print(path);
  return 0;
}
