#include "pipeline/memory/slot_pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>

#include "pipeline/memory/huge_pages.h"
#include "pipeline/memory/process_slots.h"

namespace sdio {
namespace {

class HugePageMemory final : public SlotMemory {
 public:
  HugePageMemory() {
    // Over-allocate to align: only aligned ranges become huge pages. The untouched slack costs address space alone.
    mapping_nbytes_ = kSlotNbytes + kHugePageNbytes;
    mapping_ = mmap(nullptr, mapping_nbytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(mapping_);
    data_ = static_cast<char*>(mapping_) + (kHugePageNbytes - address % kHugePageNbytes) % kHugePageNbytes;
#ifdef MADV_HUGEPAGE
    madvise(data_, kSlotNbytes, MADV_HUGEPAGE);
#endif
  }
  ~HugePageMemory() override { munmap(mapping_, mapping_nbytes_); }

 private:
  void* mapping_;
  size_t mapping_nbytes_;
};

}  // namespace

std::unique_ptr<SlotMemory> HugePageAllocator::allocate() { return std::make_unique<HugePageMemory>(); }

SlotPool::SlotPool(std::unique_ptr<SlotAllocator> allocator, size_t max_idle)
    : allocator_(std::move(allocator)), max_idle_(max_idle), process_(getpid()) {}

SlotPool::Handle SlotPool::acquire() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      Handle handle(this, std::move(idle_.back()));
      idle_.pop_back();
      return handle;
    }
    idle_.reserve(std::min(num_live_ + 1, max_idle_));  // release() must not need memory
    ++num_live_;
  }
  std::unique_ptr<SlotMemory> memory;
  try {
    memory = allocator_->allocate();
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    --num_live_;
    throw;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  ++num_allocated_;
  return {this, std::move(memory)};
}

void SlotPool::release(std::unique_ptr<SlotMemory> memory) noexcept {
  if (getpid() != process_) {  // a forked child, where the lock may be held for ever
    static_cast<void>(memory.release());
    return;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (idle_.size() < max_idle_) {
    idle_.push_back(std::move(memory));
  } else {
    --num_live_;  // freed after the lock
  }
}

size_t SlotPool::num_allocated() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return num_allocated_;
}

uint64_t SlotPool::nbytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<uint64_t>(num_live_) * kSlotNbytes;
}

uint64_t SlotPool::idle_nbytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<uint64_t>(idle_.size()) * kSlotNbytes;
}

void SlotPool::release_idle() { trim(0); }

void SlotPool::trim(uint64_t max_nbytes) {
  std::vector<std::unique_ptr<SlotMemory>> freed;  // when the lock has been released: some memory takes another one
  std::lock_guard<std::mutex> lock(mutex_);
  while (!idle_.empty() && static_cast<uint64_t>(num_live_) * kSlotNbytes > max_nbytes) {
    freed.push_back(std::move(idle_.back()));
    idle_.pop_back();
    --num_live_;
  }
}

SlotPool& SlotPool::host() { return ProcessSlots<HugePageAllocator>::regions(); }
SlotPool& SlotPool::snapshots() { return ProcessSlots<HugePageAllocator>::snapshots(); }

}  // namespace sdio
