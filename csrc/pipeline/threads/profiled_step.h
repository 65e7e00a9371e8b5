// Tells a profiler what each thread of the pipeline does, and when. The pipeline knows no profiler: core plugs in the
// one of a _torch module.
#pragma once

#include <functional>
#include <memory>

namespace sdio {

class StepRecorder {
 public:
  // A step that has begun; it ends with this.
  class Open {
   public:
    Open() = default;
    Open(const Open&) = delete;
    Open& operator=(const Open&) = delete;
    virtual ~Open() = default;
  };

  virtual ~StepRecorder() = default;

  // Called where steps begin, at least once a region. Null, and next to free, where nobody records in this thread.
  virtual std::unique_ptr<Open> begin(const char* name) = 0;

  // Returns a function that another thread calls, so that it records as this one does now.
  virtual std::function<void()> for_another_thread() = 0;
};

// Sets it for all threads, before any of them runs the pipeline. It must live as long as the process.
void set_step_recorder(StepRecorder* recorder);

// For WorkerThreads: for_another_thread() of the recorder, or nothing where there is none.
std::function<void()> recording_for_another_thread();

// One step of one thread. Names are "statedict_io::" and what is done.
class ProfiledStep {
 public:
  explicit ProfiledStep(const char* name);

 private:
  const std::unique_ptr<StepRecorder::Open> open_;
};

}  // namespace sdio
