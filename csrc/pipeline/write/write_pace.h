// Keeps writers below a number of bytes per second, so that a write in the background leaves the disk to others too.
//
// Any thread may call any method.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace sdio {

class WritePace {
 public:
  explicit WritePace(double bytes_per_second) : bytes_per_second_(bytes_per_second) {}  // 0: no limit

  // Returns when `nbytes` more may be written, or after cancel().
  void wait_for(uint64_t nbytes);

  void cancel();

 private:
  const double bytes_per_second_;
  std::mutex mutex_;
  std::condition_variable cancel_called_;
  bool cancelled_ = false;
  std::chrono::steady_clock::time_point next_{};  // when what has been let through so far will have been written
};

}  // namespace sdio
