#include "staging/profiler_steps.h"

#include <ATen/record_function.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <memory>
#include <utility>

#include "pipeline/profiled_step.h"

namespace sdio {
namespace {

constexpr auto kScope = at::RecordScope::USER_SCOPE;  // that of torch.profiler.record_function

class RecordedStep final : public StepRecorder::Open {
 public:
  RecordedStep(at::StepCallbacks&& callbacks, const char* name) : function_(std::move(callbacks)) {
    function_.before(name);
  }

 private:
  at::RecordFunction function_;
};

class ProfilerSteps final : public StepRecorder {
 public:
  std::unique_ptr<Open> begin(const char* name) override {
    auto callbacks = at::getStepCallbacksUnlessEmpty(kScope);
    if (!callbacks.has_value()) return nullptr;
    return std::make_unique<RecordedStep>(std::move(*callbacks), name);
  }

  // A profile belongs to the thread that began it. Only what makes it so is taken along: the rest of
  // at::ThreadLocalState would bring dispatch modes, which are Python, into threads that do without the GIL.
  std::function<void()> for_another_thread() override {
    return [functions = at::get_record_function_tls_(), info = c10::ThreadLocalDebugInfo::current()] {
      at::set_record_function_tls_(functions);
      c10::ThreadLocalDebugInfo::_forceCurrentDebugInfo(info);
    };
  }
};

}  // namespace

void record_steps_in_profiles() {
  static ProfilerSteps steps;
  set_step_recorder(&steps);
}

}  // namespace sdio
