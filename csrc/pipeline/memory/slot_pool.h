// Staging memory that outlives a save: the page faults of fresh buffers would cost more than the copy into them.
//
// A SlotPool may be used from any thread. A slot belongs to whoever acquired it until the handle is destroyed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace sdio {

inline constexpr size_t kSlotNbytes = 8u << 20;

// Page-aligned memory of kSlotNbytes.
class SlotMemory {
 public:
  virtual ~SlotMemory() = default;
  char* data() const { return data_; }

 protected:
  char* data_ = nullptr;
};

class SlotAllocator {
 public:
  virtual ~SlotAllocator() = default;
  virtual std::unique_ptr<SlotMemory> allocate() = 0;  // throws std::bad_alloc
};

// Private anonymous memory, in huge pages where the kernel gives them.
class HugePageAllocator final : public SlotAllocator {
 public:
  std::unique_ptr<SlotMemory> allocate() override;
};

class SlotPool {
 public:
  class Handle {
   public:
    Handle(SlotPool* pool, std::unique_ptr<SlotMemory> memory) : pool_(pool), memory_(std::move(memory)) {}
    Handle(Handle&&) noexcept = default;
    Handle& operator=(Handle&& other) noexcept {
      std::swap(pool_, other.pool_);
      std::swap(memory_, other.memory_);
      return *this;
    }
    ~Handle() {
      if (memory_) pool_->release(std::move(memory_));
    }
    char* data() const { return memory_->data(); }
    SlotMemory& memory() const { return *memory_; }

   private:
    SlotPool* pool_;
    std::unique_ptr<SlotMemory> memory_;
  };

  // Keeps at most `max_idle` slots between saves.
  SlotPool(std::unique_ptr<SlotAllocator> allocator, size_t max_idle);

  Handle acquire();
  size_t num_allocated() const;  // so far; a save that finds all its slots in the pool does not change it
  uint64_t nbytes() const;       // of all its slots, idle or not
  uint64_t idle_nbytes() const;
  void release_idle();  // gives idle memory back to the system
  // Gives back idle slots until nbytes() is at most `max_nbytes`, or none are idle.
  void trim(uint64_t max_nbytes);

  // The process's pools of huge-page slots; see process_slots.h.
  static SlotPool& host();
  static SlotPool& snapshots();

 private:
  void release(std::unique_ptr<SlotMemory> memory) noexcept;

  const std::unique_ptr<SlotAllocator> allocator_;
  const size_t max_idle_;
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<SlotMemory>> idle_;
  size_t num_allocated_ = 0;
  size_t num_live_ = 0;
  const int process_;
};

}  // namespace sdio
