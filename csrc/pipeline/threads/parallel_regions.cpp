#include "pipeline/threads/parallel_regions.h"

#include <algorithm>
#include <atomic>

namespace sdio {

void for_each_region(const Regions& regions, size_t num_threads,
                     const std::function<std::unique_ptr<RegionWorker>()>& start_worker,
                     const std::function<void()>& cancel, const Watcher& watch) {
  std::atomic<uint64_t> next_region{0};
  std::atomic<uint64_t> bytes_done{0};
  WorkerThreads threads(cancel);
  const auto work = [&] {
    const std::unique_ptr<RegionWorker> worker = start_worker();
    for (uint64_t region = next_region++; region < regions.count() && threads.go_on(); region = next_region++) {
      const uint64_t nbytes = regions.nbytes_of(region);
      worker->work(regions.begin(region), nbytes);
      bytes_done += nbytes;
    }
  };
  const auto count = static_cast<size_t>(std::min<uint64_t>(num_threads, regions.count()));
  threads.run(count > 1 ? count : 0, work, [&] { watch(bytes_done); });
}

}  // namespace sdio
