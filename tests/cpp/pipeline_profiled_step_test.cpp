// Which steps a recorder is told of, in which threads.
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>

#include "archive_case.h"
#include "pipeline/threads/profiled_step.h"
#include "pipeline/threads/worker_threads.h"

namespace sdio {
namespace {

// Records in the thread that said so, and in those that it was passed on to.
class Recorder final : public StepRecorder {
 public:
  Recorder() { set_step_recorder(this); }
  ~Recorder() override { set_step_recorder(nullptr); }

  std::unique_ptr<Open> begin(const char* name) override {
    if (!here_) return nullptr;
    std::lock_guard<std::mutex> lock(mutex_);
    ++num_open;
    ++steps[name];
    threads.insert(std::this_thread::get_id());
    return std::make_unique<OpenStep>(*this);
  }

  std::function<void()> for_another_thread() override {
    return [here = here_] { here_ = here; };
  }

  static void record_here(bool here) { here_ = here; }

  int num_open = 0;
  std::map<std::string, int> steps;
  std::set<std::thread::id> threads;

 private:
  class OpenStep final : public Open {
   public:
    explicit OpenStep(Recorder& recorder) : recorder_(recorder) {}
    ~OpenStep() override {
      std::lock_guard<std::mutex> lock(recorder_.mutex_);
      --recorder_.num_open;
    }

   private:
    Recorder& recorder_;
  };

  static thread_local bool here_;
  std::mutex mutex_;
};

thread_local bool Recorder::here_ = false;

class ProfiledSteps : public ::testing::Test {
 protected:
  void TearDown() override { Recorder::record_here(false); }

  Recorder recorder_;
};

WriteOptions four_threads() {
  WriteOptions options;
  options.num_writers = 4;
  options.region_nbytes = 64u << 10;
  return options;
}

TEST_F(ProfiledSteps, AreThoseOfEachRegionInEachThread) {
  const Case made = make_case({300000, 17, 2 << 20}, 64, On::kDevice);
  const TemporaryFile file;
  PositionalSink sink(file.fd(), DirectIo::kAuto);
  Recorder::record_here(true);
  write_archive(*made.records, sink, four_threads(), no_watch);
  const uint64_t file_nbytes = made.records->layout->file_nbytes();
  const int num_regions = static_cast<int>((file_nbytes + (64u << 10) - 1) / (64u << 10));
  EXPECT_EQ(recorder_.steps["statedict_io::write"], num_regions);
  EXPECT_EQ(recorder_.steps["statedict_io::device_to_host"], made.device->num_copies);
  EXPECT_GE(recorder_.steps["statedict_io::crc32"], recorder_.steps["statedict_io::device_to_host"]);
  EXPECT_GT(recorder_.threads.size(), 1u);
  EXPECT_EQ(recorder_.num_open, 0);
}

TEST_F(ProfiledSteps, AreNotThoseOfCallersThatDoNotRecord) {
  const Case made = make_case({2 << 20});
  const TemporaryFile file;
  PositionalSink sink(file.fd(), DirectIo::kAuto);
  write_archive(*made.records, sink, four_threads(), no_watch);
  EXPECT_TRUE(recorder_.steps.empty());
}

TEST_F(ProfiledSteps, EndWhereTheyThrow) {
  Recorder::record_here(true);
  WorkerThreads workers;
  const auto work = [] {
    const ProfiledStep step("statedict_io::refused");
    throw std::runtime_error("no");
  };
  EXPECT_THROW(workers.run(3, work, [] {}), std::runtime_error);
  EXPECT_EQ(recorder_.steps["statedict_io::refused"], 3);
  EXPECT_EQ(recorder_.num_open, 0);
}

}  // namespace
}  // namespace sdio
