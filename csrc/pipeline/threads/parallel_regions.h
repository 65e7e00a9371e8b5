// Regions of a file, worked on by several threads while the calling thread watches, or by that thread alone.
//
// Regions are handed out in ascending order, each to one worker. The first error stops all workers and is thrown in the
// calling thread after they have stopped.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "pipeline/threads/worker_threads.h"

namespace sdio {

// What one thread does; made and destroyed in that thread.
class RegionWorker {
 public:
  virtual ~RegionWorker() = default;
  virtual void work(uint64_t begin, uint64_t nbytes) = 0;
};

struct Regions {
  uint64_t nbytes;         // of all
  uint64_t region_nbytes;  // of each but the last
  uint64_t count() const { return (nbytes + region_nbytes - 1) / region_nbytes; }
  uint64_t begin(uint64_t index) const { return index * region_nbytes; }
  uint64_t nbytes_of(uint64_t index) const { return std::min(region_nbytes, nbytes - begin(index)); }
};

// `start_worker` is called in each thread. `cancel` is called, from any of them, when one has failed: it must make the
// others return from whatever they wait for.
void for_each_region(const Regions& regions, size_t num_threads,
                     const std::function<std::unique_ptr<RegionWorker>()>& start_worker,
                     const std::function<void()>& cancel, const Watcher& watch);

}  // namespace sdio
