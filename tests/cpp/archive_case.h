// A made-up archive of random records, in memory and on a device that is late, and a file to write it to: what the
// tests of the pipeline share.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "archive/layout.h"
#include "file/system_error.h"
#include "pipeline/write/archive_writer.h"
#include "random_bytes.h"
#include "temporary_file.h"

namespace sdio {

inline void no_watch(uint64_t) {}

// The bytes land after copy() was called, from another thread: whoever reads the slot without waiting sees the old
// ones.
class LateDevice final : public DeviceSource {
 public:
  explicit LateDevice(std::vector<const char*> records) : records_(std::move(records)) {}

  void copy(const std::vector<DevicePiece>& pieces) override {
    std::thread engine([this, &pieces] {
      std::this_thread::sleep_for(lateness);
      for (const DevicePiece& piece : pieces) {
        std::memcpy(piece.destination, records_[piece.record] + piece.record_offset, piece.nbytes);
      }
    });
    engine.join();
    ++num_copies;
  }
  SlotPool& slots() override { return SlotPool::host(); }
  std::atomic<int> num_copies{0};
  std::chrono::microseconds lateness{500};  // of each copy

 private:
  std::vector<const char*> records_;
};

struct Case {
  std::vector<std::string> bytes;
  std::unique_ptr<LateDevice> device;
  std::unique_ptr<Records> records;
};

enum class On { kMemory, kDevice, kMixed };

inline Case make_case(const std::vector<size_t>& sizes, uint64_t alignment = 64, On on = On::kMemory,
                      bool compute_crc32 = true) {
  Case made;
  for (const size_t nbytes : sizes) made.bytes.push_back(random_bytes(nbytes, made.bytes.size()));
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
  made.records = std::make_unique<Records>(Records{std::make_shared<const ArchiveLayout>("case", specs, alignment),
                                                   payloads, compute_crc32, made.device.get()});
  return made;
}

inline std::string streamed(const Records& records) {
  std::string all;
  stream_archive(records, [&](const char* bytes, size_t nbytes) { all.append(bytes, nbytes); }, no_watch);
  return all;
}

// Mixes records that share a region, fill several, and are empty.
inline const std::vector<size_t> kSizes = {3,      0, 1 << 20, 12345,         64,      7 << 20, 1000003,
                                           100000, 8, 5,       (9 << 20) + 1, 32 << 10};

}  // namespace sdio
