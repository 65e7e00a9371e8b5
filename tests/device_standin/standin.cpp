// An accelerator made of host memory, for tests: torch's PrivateUse1 device with two devices, streams that are threads,
// and copies that finish late.
//
// What real hardware makes likely to go wrong is made certain to: a command waits before it touches a byte, the
// destination of a copy to the host holds garbage until the copy lands, and freed memory is overwritten in the order of
// the stream it was allocated on. Code that leaves out a wait reads wrong bytes. Settings and counters are set and read
// by name from Python through the C functions at the end.
#include <ATen/EmptyTensor.h>
#include <ATen/core/IListRef.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

namespace {

constexpr int kNumDevices = 2;
constexpr c10::StreamId kPoolSize = 4;  // streams 1 to 4; 0 is the default stream
constexpr size_t kPage = 4096;
constexpr int kGarbage = 0xDB;

// ---- settings and counters

struct Value {
  explicit Value(int64_t initial) : initial(initial), now(initial) {}
  const int64_t initial;
  std::atomic<int64_t> now;
  operator int64_t() const { return now; }
  void operator++() { ++now; }
  void operator--() { --now; }
  void operator+=(int64_t n) { now += n; }
  // A countdown: whether this is the call it was set to; 0 counts nothing.
  bool expires() {
    int64_t left = now;
    while (left > 0 && !now.compare_exchange_weak(left, left - 1)) {
    }
    return left == 1;
  }
};

std::map<std::string, Value>& values() {
  static auto* const all = new std::map<std::string, Value>;
  return *all;
}

Value& value(const std::string& name, int64_t initial) { return values().try_emplace(name, initial).first->second; }

std::array<Value*, kNumDevices> value_of_each_device(const std::string& name) {
  return {&value(name + ":0", 0), &value(name + ":1", 0)};
}

// Settings.
Value& delay_us = value("delay_us", 0);                  // of each command, before it touches a byte
Value& fail_host_copy = value("fail_host_copy", 0);      // n: the n-th copy to the host from now on is refused
Value& fail_device_copy = value("fail_device_copy", 0);  // n: so is the n-th copy to a device
Value& no_streams = value("no_streams", 0);              // 1: there is but the default stream
Value& fail_event_synchronize = value("fail_event_synchronize", 0);  // n: so is the n-th wait of the host for an event
Value& lose_event_synchronize = value("lose_event_synchronize", 0);  // 1: the host does not wait for events
Value& lose_event_block = value("lose_event_block", 0);              // 1: streams do not wait for events
Value& fail_allocation = value("fail_allocation", 0);  // n: the n-th allocation from now on finds no memory
Value& pinned_memory = value("pinned_memory", 1);      // 0: there is none; 2: it is not page-aligned

// Counters.
Value& host_copies = value("host_copies", 0);                          // queued, not waited for
Value& host_copies_to_pageable = value("host_copies_to_pageable", 0);  // those of them whose destination is not pinned
Value& host_copy_nbytes = value("host_copy_nbytes", 0);
Value& host_copies_in_flight = value("host_copies_in_flight", 0);
Value& device_copies = value("device_copies", 0);  // queued from pinned memory, not waited for
Value& device_copies_in_flight = value("device_copies_in_flight", 0);
Value& most_device_copies_in_flight = value("most_device_copies_in_flight", 0);
Value& blocking_copies = value("blocking_copies", 0);
Value& gathers = value("gathers", 0);
Value& event_synchronizations = value("event_synchronizations", 0);
Value& stream_synchronizations = value("stream_synchronizations", 0);
Value& device_synchronizations = value("device_synchronizations", 0);
Value& pinned_allocations = value("pinned_allocations", 0);
const auto commands = value_of_each_device("commands");
const auto allocations = value_of_each_device("allocations");
const auto streams_taken = value_of_each_device("streams_taken");
const auto events_recorded = value_of_each_device("events_recorded");

// ---- streams and events

class Flag {
 public:
  void raise() {
    const std::lock_guard<std::mutex> lock(mutex_);
    raised_ = true;
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return raised_; });
  }
  bool raised() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return raised_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool raised_ = false;
};

// Runs commands one after another in a thread of its own. Never destroyed.
class Queue {
 public:
  Queue() {
    std::thread([this] { run(); }).detach();
  }

  void push(std::function<void()> command) {
    const std::lock_guard<std::mutex> lock(mutex_);
    commands_.push_back(std::move(command));
    changed_.notify_one();
  }

  std::shared_ptr<Flag> push_flag() {
    auto flag = std::make_shared<Flag>();
    push([flag] { flag->raise(); });
    return flag;
  }

 private:
  void run() {
    const c10::InferenceMode may_write_inference_tensors;
    while (true) {
      std::function<void()> command;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return !commands_.empty(); });
        command = std::move(commands_.front());
        commands_.pop_front();
      }
      command();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> commands_;
};

Queue& queue_of(const c10::Stream& stream) {
  static auto* const queues = new std::array<std::array<Queue, kPoolSize + 1>, kNumDevices>;
  return queues->at(stream.device_index()).at(static_cast<size_t>(stream.id()));
}

struct Event {
  std::shared_ptr<Flag> recorded;
};

c10::Device device_at(c10::DeviceIndex index) { return {c10::DeviceType::PrivateUse1, index}; }

c10::Stream stream_at(c10::DeviceIndex device, c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, device_at(device), id);
}

thread_local c10::DeviceIndex current_device = 0;
thread_local std::array<c10::StreamId, kNumDevices> current_streams = {};

c10::Stream current_stream(c10::DeviceIndex device) { return stream_at(device, current_streams.at(device)); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }

  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device previous = getDevice();
    setDevice(device);
    return previous;
  }
  c10::Device getDevice() const override { return device_at(current_device); }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() >= 0 && device.index() < kNumDevices, "standin: there is no ", device);
    current_device = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = device.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return kNumDevices; }

  c10::Stream getStream(c10::Device device) const override { return current_stream(device.index()); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream_at(device.index(), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool = false) const override {
    TORCH_CHECK(no_streams == 0, "standin: there are no streams");
    static std::array<std::atomic<c10::StreamId>, kNumDevices> taken = {};
    ++*streams_taken.at(device.index());
    return stream_at(device.index(), 1 + taken.at(device.index())++ % kPoolSize);
  }
  c10::Stream getNewStream(c10::Device device, int = 0) const override { return getStreamFromGlobalPool(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream previous = current_stream(stream.device_index());
    current_streams.at(stream.device_index()) = stream.id();
    return previous;
  }
  bool queryStream(const c10::Stream& stream) const override { return queue_of(stream).push_flag()->raised(); }
  void synchronizeStream(const c10::Stream& stream) const override {
    ++stream_synchronizations;
    queue_of(stream).push_flag()->wait();
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    ++device_synchronizations;
    for (c10::StreamId id = 0; id <= kPoolSize; ++id) queue_of(stream_at(device, id)).push_flag()->wait();
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    ++*events_recorded.at(stream.device_index());
    static_cast<Event*>(*event)->recorded = queue_of(stream).push_flag();
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event == nullptr || lose_event_block) return;
    queue_of(stream).push([recorded = static_cast<Event*>(event)->recorded] { recorded->wait(); });
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || static_cast<Event*>(event)->recorded->raised();
  }
  void synchronizeEvent(void* event) const override {
    ++event_synchronizations;
    TORCH_CHECK(!fail_event_synchronize.expires(), "standin: the device was lost");
    if (event == nullptr || lose_event_synchronize) return;
    static_cast<Event*>(event)->recorded->wait();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// Queues a command on the calling thread's current stream of `device`.
void queue_command(c10::Device device, std::function<void()> work) {
  ++*commands.at(device.index());
  queue_of(current_stream(device.index())).push([delay = delay_us.now.load(), work = std::move(work)] {
    if (delay > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay));
    work();
  });
}

// ---- memory

// As caching allocators do it: freed memory serves the next allocation on the same stream at once, and is never given
// back.
struct DeviceMemory final : c10::Allocator {
  struct Block {
    void* data;
    size_t nbytes;
    c10::Stream stream;
  };
  using Key = std::tuple<c10::DeviceIndex, c10::StreamId, size_t>;

  static Key key_of(const c10::Stream& stream, size_t nbytes) { return {stream.device_index(), stream.id(), nbytes}; }

  c10::DataPtr allocate(size_t nbytes) override {
    const c10::Device device = device_at(current_device);
    if (nbytes == 0) return {nullptr, device};
    TORCH_CHECK_WITH(OutOfMemoryError, !fail_allocation.expires(), "standin: out of memory");
    ++*allocations.at(device.index());
    const c10::Stream stream = current_stream(device.index());
    Block* block = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex());
      std::vector<Block*>& idle_blocks = idle()[key_of(stream, nbytes)];
      if (!idle_blocks.empty()) {
        block = idle_blocks.back();
        idle_blocks.pop_back();
      }
    }
    if (block == nullptr) block = new Block{std::aligned_alloc(64, (nbytes + 63) / 64 * 64), nbytes, stream};
    TORCH_CHECK(block->data != nullptr, "standin: out of memory");
    return {block->data, block, &free, device};
  }

  static void free(void* context) {
    auto* const block = static_cast<Block*>(context);
    queue_of(block->stream).push([block] { std::memset(block->data, kGarbage, block->nbytes); });
    const std::lock_guard<std::mutex> lock(mutex());
    idle()[key_of(block->stream, block->nbytes)].push_back(block);
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "standin: copy_data"); }

  static std::mutex& mutex() {
    static auto* const instance = new std::mutex;
    return *instance;
  }
  static std::map<Key, std::vector<Block*>>& idle() {
    static auto* const instance = new std::map<Key, std::vector<Block*>>;
    return *instance;
  }
};

DeviceMemory device_memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &device_memory)

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    ++pinned_allocations;
    const size_t misalignment = pinned_memory == 2 ? 64 : 0;
    const size_t mapped = (nbytes + misalignment + kPage - 1) / kPage * kPage;
    char* const start = static_cast<char*>(std::aligned_alloc(kPage, mapped));
    TORCH_CHECK(start != nullptr, "standin: out of pinned memory");
    const std::lock_guard<std::mutex> lock(mutex());
    ranges()[start] = mapped;
    return {start + misalignment, start, &free, c10::DeviceType::CPU};
  }
  static void free(void* start) {
    const std::lock_guard<std::mutex> lock(mutex());
    ranges().erase(static_cast<char*>(start));
    std::free(start);
  }
  static bool owns(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex());
    const auto* const byte = static_cast<const char*>(data);
    const auto after = ranges().upper_bound(byte);
    return after != ranges().begin() && byte < std::prev(after)->first + std::prev(after)->second;
  }
  void copy_data(void* to, const void* from, size_t nbytes) const override { std::memcpy(to, from, nbytes); }

  static std::mutex& mutex() {
    static auto* const instance = new std::mutex;
    return *instance;
  }
  static std::map<const char*, size_t>& ranges() {
    static auto* const instance = new std::map<const char*, size_t>;
    return *instance;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kNumDevices; }
  void setCurrentDevice(c10::DeviceIndex device) const override { Guard().setDevice(device_at(device)); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    const c10::DeviceGuard guard(storage.device());
    c10::DataPtr resized = device_memory.allocate(nbytes);
    const size_t kept = std::min(nbytes, storage.nbytes());
    queue_command(storage.device(), [to = resized.get(), from = storage.data(), kept] { std::memcpy(to, from, kept); });
    storage.set_data_ptr_noswap(std::move(resized));
    storage.set_nbytes(nbytes);
  }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::owns(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static auto* const allocator = new PinnedMemory;
    TORCH_CHECK(pinned_memory != 0, "standin: there is no pinned memory");
    return allocator;
  }
};

const bool hooks_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

// ---- kernels

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, &device_memory, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, &device_memory, kKeys, c10::dtype_or_default(dtype));
}

// `tensor`, which may lie on a device, as the CPU sees it. Does not own the memory.
at::Tensor on_host(const at::Tensor& tensor) {
  return at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
                       tensor.options().device(c10::kCPU).pinned_memory(false));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (from.numel() == 0) return to;
  const bool to_host = to.is_cpu();
  TORCH_CHECK(to_host || from.is_cpu() || from.device() == to.device(), "standin: no copies from device to device");
  const c10::Device device = to_host ? from.device() : to.device();
  TORCH_CHECK(!(to_host ? fail_host_copy : fail_device_copy).expires(), "standin: the copy was refused");
  const bool same_layout = from.dtype() == to.dtype() && from.sizes() == to.sizes() && from.strides() == to.strides() &&
                           from.is_non_overlapping_and_dense();
  std::function<void()> move;
  if (same_layout) {
    move = [to = to.mutable_data_ptr(), from = from.const_data_ptr(), nbytes = from.nbytes()] {
      std::memcpy(to, from, nbytes);
    };
  } else {
    move = [to = on_host(to), from = on_host(from)] { to.copy_(from); };
  }
  const bool from_pageable = from.is_cpu() && !PinnedMemory::owns(from.const_data_ptr());
  if (!non_blocking || from_pageable) {
    ++blocking_copies;
    queue_command(device, std::move(move));
    queue_of(current_stream(device.index())).push_flag()->wait();
  } else if (to_host) {
    ++host_copies;
    ++host_copies_in_flight;
    host_copy_nbytes += static_cast<int64_t>(from.nbytes());
    if (!PinnedMemory::owns(to.const_data_ptr())) ++host_copies_to_pageable;
    if (same_layout) std::memset(to.mutable_data_ptr(), kGarbage, to.nbytes());
    queue_command(device, [move = std::move(move)] {
      move();
      --host_copies_in_flight;
    });
  } else {
    ++device_copies;
    ++device_copies_in_flight;
    most_device_copies_in_flight.now = std::max<int64_t>(most_device_copies_in_flight, device_copies_in_flight);
    queue_command(device, [move = std::move(move)] {
      move();
      --device_copies_in_flight;
    });
  }
  return to;
}

at::Tensor& fill(at::Tensor& self, const at::Scalar& number) {
  queue_command(self.device(), [host = on_host(self), number] { host.fill_(number); });
  return self;
}

at::Tensor& zero(at::Tensor& self) { return fill(self, 0); }

at::Tensor cat(const at::ITensorListRef& tensors, int64_t) {
  ++gathers;
  std::vector<std::pair<const void*, size_t>> pieces;
  int64_t numel = 0;
  const at::Tensor first = *tensors.begin();
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.device() == first.device() && tensor.dtype() == first.dtype() && tensor.dim() == 1 &&
                    tensor.is_contiguous(),
                "standin: cat of vectors only");
    pieces.emplace_back(tensor.const_data_ptr(), tensor.nbytes());
    numel += tensor.numel();
  }
  const c10::DeviceGuard guard(first.device());
  at::Tensor whole = at::detail::empty_generic({numel}, &device_memory, kKeys, first.scalar_type(), std::nullopt);
  queue_command(first.device(), [to = static_cast<char*>(whole.mutable_data_ptr()), pieces = std::move(pieces)] {
    char* next = to;
    for (const auto& [data, nbytes] : pieces) {
      std::memcpy(next, data, nbytes);
      next += nbytes;
    }
  });
  return whole;
}

at::Tensor& set_storage_range(at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size,
                              c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(storage), offset, size, stride);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage) { return at::native::set_(self, std::move(storage)); }

at::Tensor as_strided(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride,
                      std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

at::Tensor view(const at::Tensor& self, c10::IntArrayRef size) { return at::native::view(self, size); }

at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("fill_.Scalar", &fill);
  library.impl("zero_", &zero);
  library.impl("cat", &cat);
  library.impl("set_.source_Storage_storage_offset", &set_storage_range);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("as_strided", &as_strided);
  library.impl("view", &view);
  library.impl("_reshape_alias", &reshape_alias);
}

}  // namespace

// ---- for Python, through ctypes

extern "C" {

// Whether there is a setting or counter `name`.
bool standin_has(const char* name) { return values().count(name) != 0; }
int64_t standin_get(const char* name) { return values().at(name); }
void standin_set(const char* name, int64_t number) { values().at(name).now = number; }

// Waits for every command, without counting that as a synchronisation.
void standin_drain() {
  for (c10::DeviceIndex device = 0; device < kNumDevices; ++device) {
    for (c10::StreamId id = 0; id <= kPoolSize; ++id) queue_of(stream_at(device, id)).push_flag()->wait();
  }
}

// Waits for every command, then gives settings and counters their first values.
void standin_reset() {
  standin_drain();
  for (auto& named : values()) named.second.now = named.second.initial;
}
}
