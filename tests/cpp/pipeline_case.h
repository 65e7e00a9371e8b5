// Archives of random records, in memory and on a device whose copies finish late, for the tests of the pipeline.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "pipeline/archive_writer.h"

namespace sdio {

inline void no_watch(uint64_t) {}

class TemporaryFile {
 public:
  TemporaryFile() { fd_ = mkstemp(path_); }
  ~TemporaryFile() {
    close(fd_);
    unlink(path_);
  }
  int fd() const { return fd_; }
  std::string read_all() const {
    // Through a description of its own: the sink may have left O_DIRECT on the other.
    const int fd = open(path_, O_RDONLY);
    struct stat facts;
    fstat(fd, &facts);
    std::string bytes(static_cast<size_t>(facts.st_size), '\0');
    EXPECT_EQ(pread(fd, &bytes[0], bytes.size(), 0), facts.st_size);
    close(fd);
    return bytes;
  }

 private:
  char path_[40] = "/var/tmp/sdio-pipeline-test-XXXXXX";
  int fd_;
};

// The bytes land after copy() was called, from another thread: whoever reads the slot without waiting sees the old
// ones.
class LateDevice final : public DeviceSource {
 public:
  explicit LateDevice(std::vector<const char*> records) : records_(std::move(records)) {}

  void copy(const std::vector<DevicePiece>& pieces) override {
    std::thread engine([this, &pieces] {
      std::this_thread::sleep_for(std::chrono::microseconds(500));
      for (const DevicePiece& piece : pieces) {
        std::memcpy(piece.destination, records_[piece.record] + piece.record_offset, piece.nbytes);
      }
    });
    engine.join();
    ++num_copies;
  }
  SlotPool& slots() override { return SlotPool::host(); }
  std::atomic<int> num_copies{0};

 private:
  std::vector<const char*> records_;
};

struct Case {
  std::vector<std::string> bytes;
  std::unique_ptr<LateDevice> device;
  std::unique_ptr<ArchiveContent> content;
};

enum class On { kMemory, kDevice, kMixed };

inline Case make_case(const std::vector<size_t>& sizes, uint64_t alignment = 64, On on = On::kMemory,
                      bool compute_crc32 = true) {
  Case made;
  std::mt19937_64 random(sizes.size());
  for (const size_t nbytes : sizes) {
    std::string bytes(nbytes, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    made.bytes.push_back(std::move(bytes));
  }
  std::vector<RecordSpec> specs;
  std::vector<Payload> payloads;
  std::vector<const char*> on_device;
  for (size_t i = 0; i < sizes.size(); ++i) {
    specs.push_back({"data/" + std::to_string(i), sizes[i]});
    Payload payload;
    payload.data = made.bytes[i].data();
    if (on == On::kDevice || (on == On::kMixed && i % 2 == 1)) payload.kind = Payload::Kind::kDevice;
    payloads.push_back(payload);
    on_device.push_back(made.bytes[i].data());
  }
  if (on != On::kMemory) made.device = std::make_unique<LateDevice>(on_device);
  made.content = std::make_unique<ArchiveContent>(
      ArchiveContent{ArchiveLayout("case", specs, alignment), payloads, compute_crc32, made.device.get()});
  return made;
}

inline std::string streamed(const ArchiveContent& content) {
  std::string all;
  stream_archive(content, [&](const char* bytes, size_t nbytes) { all.append(bytes, nbytes); }, no_watch);
  return all;
}

inline const std::vector<size_t> kSizes = {3,      0, 1 << 20, 12345,         64,      7 << 20, 1000003,
                                           100000, 8, 5,       (9 << 20) + 1, 32 << 10};

}  // namespace sdio
