#include "pipeline/write/write_pace.h"

#include <algorithm>

namespace sdio {

void WritePace::wait_for(uint64_t nbytes) {
  if (bytes_per_second_ <= 0) return;
  using Clock = std::chrono::steady_clock;
  const auto duration = std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double>(static_cast<double>(nbytes) / bytes_per_second_));
  std::unique_lock<std::mutex> lock(mutex_);
  // The wait includes the time for these bytes, so that a file of one region is paced too.
  next_ = std::max(next_, Clock::now()) + duration;
  const Clock::time_point mine = next_;
  cancel_called_.wait_until(lock, mine, [&] { return cancelled_; });
}

void WritePace::cancel() {
  std::lock_guard<std::mutex> lock(mutex_);
  cancelled_ = true;
  cancel_called_.notify_all();
}

}  // namespace sdio
