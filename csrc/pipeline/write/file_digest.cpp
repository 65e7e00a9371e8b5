#include "pipeline/write/file_digest.h"

#include <algorithm>

#include "pipeline/threads/profiled_step.h"

namespace sdio {

void FileDigest::add(uint64_t index, const std::vector<iovec>& pieces, uint64_t nbytes, ReadGate* gate) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return next_ == index || cancelled_; });
    if (cancelled_) throw Cancelled();
  }
  {
    const ProfiledStep step("statedict_io::sha256");
    const ReadGate::Reading reading(gate);
    for (const iovec& piece : pieces) {
      const size_t taken = static_cast<size_t>(std::min<uint64_t>(nbytes, piece.iov_len));
      hash_.update(piece.iov_base, taken);
      nbytes -= taken;
    }
    hash_.update_zeros(nbytes);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  ++next_;
  changed_.notify_all();
}

void FileDigest::cancel() {
  const std::lock_guard<std::mutex> lock(mutex_);
  cancelled_ = true;
  changed_.notify_all();
}

}  // namespace sdio
