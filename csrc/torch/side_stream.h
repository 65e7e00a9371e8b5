// The stream that copies are queued on, beside the caller's.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "torch/statuses.h"

namespace sdio {

// A stream of the device's pool, ordered after what is queued now on the calling thread's current stream there. Throws
// Unsupported where the device has no streams or no events.
inline c10::Stream side_stream_after_current(c10::Device device) {
  return supported([&] {
    const c10::impl::VirtualGuardImpl backend(device.type());
    const c10::Stream side = backend.getStreamFromGlobalPool(device);
    c10::Event queued_work(device.type());
    queued_work.record(backend.getStream(device));
    queued_work.block(side);
    return side;
  });
}

// Waits for a stream when it is destroyed, unless landed() has been called. So no copy that was queued before a failure
// touches its slot when another save or load has it.
class LandsOnFailure {
 public:
  explicit LandsOnFailure(const c10::Stream& stream) : stream_(stream) {}
  LandsOnFailure(const LandsOnFailure&) = delete;
  LandsOnFailure& operator=(const LandsOnFailure&) = delete;
  ~LandsOnFailure() {
    if (landed_) return;
    try {
      stream_.synchronize();
    } catch (...) {  // a lost device copies nothing any more; the first error is the one to report
    }
  }
  void landed() { landed_ = true; }

 private:
  const c10::Stream stream_;
  bool landed_ = false;
};

}  // namespace sdio
