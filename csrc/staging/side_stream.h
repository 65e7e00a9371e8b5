// The stream that the pipeline copies on, beside the caller's.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace sdio {

// A stream of the device's pool, ordered after what is queued now on the calling thread's current stream there. Throws
// c10::Error where the device has no streams or no events.
inline c10::Stream side_stream_after_current(c10::Device device) {
  const c10::impl::VirtualGuardImpl backend(device.type());
  const c10::Stream side = backend.getStreamFromGlobalPool(device);
  c10::Event queued_work(device.type());
  queued_work.record(backend.getStream(device));
  queued_work.block(side);
  return side;
}

}  // namespace sdio
