// The CRCs of all records of one archive, put together from pieces that any thread reports in any order.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>

#include "archive/file_layout.h"

namespace sdio {

// Thrown in a worker that waits for a CRC which will never come because another worker failed.
struct Cancelled : std::exception {
  const char* what() const noexcept override { return "the save was cancelled"; }
};

class RecordChecksums {
 public:
  explicit RecordChecksums(const FileLayout& layout);

  // The piece of `record` that starts at `record_offset` has the CRC `crc` (0 when none is computed); its bytes are
  // still at `bytes`.
  void add(size_t record, uint64_t record_offset, const char* bytes, uint64_t nbytes, uint32_t crc);

  // For a record whose bytes are not added: its CRC is 0.
  void set_complete(size_t record);

  uint32_t wait(size_t record);  // blocks until every piece was added; throws Cancelled
  void wait_for_all_but(size_t record);
  void cancel();

  // For a complete record. The first 8 bytes are known if it has so many and was completed by add().
  uint32_t crc(size_t record) const { return states_[record].crc.load(); }
  const unsigned char* first_bytes(size_t record) const { return states_[record].first_bytes; }

 private:
  struct State {
    std::atomic<uint64_t> nbytes_left{0};
    std::atomic<uint32_t> crc{0};
    unsigned char first_bytes[8] = {};
  };

  void completed();
  template <typename Predicate>
  void wait_until(Predicate done);

  const FileLayout& layout_;
  const std::unique_ptr<State[]> states_;
  std::atomic<size_t> records_left_;
  std::atomic<int> waiting_{0};
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace sdio
