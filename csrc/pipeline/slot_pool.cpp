#include "pipeline/slot_pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <utility>

namespace sdio {
namespace {

constexpr size_t kHugePageNbytes = 2u << 20;
constexpr size_t kMaxIdleHostSlots = 16;  // 128 MiB

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

SlotPool* host_pool = nullptr;

void start_host_pool() {
  // A lock held by another thread at fork() stays locked in the child: leave the old pool behind.
  host_pool = new SlotPool(std::make_unique<HugePageAllocator>(), kMaxIdleHostSlots);
}

}  // namespace

std::unique_ptr<SlotMemory> HugePageAllocator::allocate() { return std::make_unique<HugePageMemory>(); }

SlotPool::SlotPool(std::unique_ptr<SlotAllocator> allocator, size_t max_idle)
    : allocator_(std::move(allocator)), max_idle_(max_idle) {}

SlotPool::Handle SlotPool::acquire() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      Handle handle(this, std::move(idle_.back()));
      idle_.pop_back();
      return handle;
    }
    ++num_allocated_;
  }
  return Handle(this, allocator_->allocate());
}

void SlotPool::release(std::unique_ptr<SlotMemory> memory) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (idle_.size() < max_idle_) idle_.push_back(std::move(memory));
}

size_t SlotPool::num_allocated() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return num_allocated_;
}

void SlotPool::release_idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.clear();
}

SlotPool& SlotPool::host() {
  static const bool started = [] {
    start_host_pool();
    pthread_atfork(nullptr, nullptr, start_host_pool);
    return true;
  }();
  static_cast<void>(started);
  return *host_pool;
}

}  // namespace sdio
