#include "pipeline/threads/profiled_step.h"

namespace sdio {
namespace {

StepRecorder* recorder = nullptr;

}  // namespace

void set_step_recorder(StepRecorder* new_recorder) { recorder = new_recorder; }

std::function<void()> recording_for_another_thread() {
  return recorder != nullptr ? recorder->for_another_thread() : [] {};
}

ProfiledStep::ProfiledStep(const char* name) : open_(recorder != nullptr ? recorder->begin(name) : nullptr) {}

}  // namespace sdio
