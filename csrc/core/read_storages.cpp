#include "core/read_storages.h"

#include <cstdlib>
#include <new>
#include <utility>

#include "core/owned.h"

namespace py = pybind11;

namespace sdio {
namespace {

constexpr size_t kAlignment = 64;  // that of torch's own allocator

class Allocation final : public ReadMemory {
 public:
  explicit Allocation(uint64_t nbytes) {
    if (nbytes != 0 && posix_memalign(&data_, kAlignment, nbytes) != 0) throw std::bad_alloc();
  }
  ~Allocation() override { std::free(data_); }
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_ = nullptr;
};

class ExtentPart final : public ReadMemory {
 public:
  ExtentPart(std::shared_ptr<ExtentMemory> extent, char* data, uint64_t nbytes)
      : extent_(std::move(extent)), data_(data), nbytes_(nbytes) {}
  ~ExtentPart() override {
    // When the last part goes, the whole extent is unmapped.
    if (extent_.use_count() > 1) ExtentMemory::release(data_, nbytes_);
  }

 private:
  const std::shared_ptr<ExtentMemory> extent_;
  char* const data_;
  const uint64_t nbytes_;
};

}  // namespace

char* ReadStorages::allocate(size_t request, uint64_t nbytes) {
  auto memory = std::make_unique<Allocation>(nbytes);
  char* const data = memory->data();
  parts_[request] = {std::move(memory), data, nbytes};
  return data;
}

void ReadStorages::adopt(size_t request, char* data, uint64_t nbytes, std::shared_ptr<ExtentMemory> extent) {
  parts_[request] = {std::make_unique<ExtentPart>(std::move(extent), data, nbytes), data, nbytes};
}

py::list ReadStorages::storages() {
  py::list list = list_of(parts_.size(), [](size_t) { return Py_NewRef(Py_None); });
  for (size_t i = 0; i < parts_.size(); ++i) {
    Part& part = parts_[i];
    list[i] = torch().storage_over(part.data, part.nbytes, std::move(part.memory));
  }
  return list;
}

}  // namespace sdio
