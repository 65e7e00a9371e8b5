// The pipeline's steps in the profiles of torch.profiler, beside the device's own copies.
#include <ATen/record_function.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <memory>
#include <utility>

#include "torch/functions.h"

struct sdio_step {
  explicit sdio_step(at::StepCallbacks&& callbacks) : function(std::move(callbacks)) {}
  at::RecordFunction function;
};

// A profile belongs to the thread that began it. Only what makes it so is taken along: the rest of
// at::ThreadLocalState would bring dispatch modes, which are Python, into threads that do without the GIL.
struct sdio_recording {
  at::RecordFunctionTLS functions;
  std::shared_ptr<c10::ThreadLocalDebugInfo> info;
};

namespace sdio {

sdio_step* step_begin(const char* name) noexcept {
  try {
    // The scope of torch.profiler.record_function.
    auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE);
    if (!callbacks.has_value()) return nullptr;
    auto step = std::make_unique<sdio_step>(std::move(*callbacks));
    step->function.before(name);
    return step.release();
  } catch (...) {  // what a profiler throws is no reason to fail a save
    return nullptr;
  }
}

void step_end(sdio_step* step) noexcept { delete step; }

sdio_recording* recording_of_this_thread() noexcept {
  try {
    return new sdio_recording{at::get_record_function_tls_(), c10::ThreadLocalDebugInfo::current()};
  } catch (...) {
    return nullptr;
  }
}

void recording_continue(const sdio_recording* recording) noexcept {
  if (recording == nullptr) return;
  try {
    at::set_record_function_tls_(recording->functions);
    c10::ThreadLocalDebugInfo::_forceCurrentDebugInfo(recording->info);
  } catch (...) {
  }
}

void recording_delete(sdio_recording* recording) noexcept { delete recording; }

}  // namespace sdio
