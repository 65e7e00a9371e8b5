#include "archive_target.h"

#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "archive/corrupt_archive.h"
#include "archive/directory.h"
#include "checksum/crc32.h"
#include "file/positional_source.h"
#include "late_device.h"
#include "pipeline/memory/slot_pool.h"
#include "pipeline/read/payload_reader.h"
#include "pipeline/read/single_reads.h"

namespace sdio {
namespace {

std::atomic<uint64_t> allocated_nbytes{0};
std::atomic<uint64_t> peak_nbytes{0};

void count_allocated(uint64_t nbytes) {
  const uint64_t now = allocated_nbytes += nbytes;
  uint64_t peak = peak_nbytes;
  while (now > peak && !peak_nbytes.compare_exchange_weak(peak, now)) {
  }
}

void count_freed(uint64_t nbytes) { allocated_nbytes -= nbytes; }

void promise(bool kept, const char* what) {
  if (kept) return;
  std::fprintf(stderr, "archive_fuzz: %s\n", what);
  std::abort();
}

class CountedExtent : public ExtentMemory {
 public:
  CountedExtent(uint64_t file_offset, uint64_t nbytes) : ExtentMemory(file_offset, nbytes) {
    count_allocated(ExtentMemory::nbytes());
  }
  ~CountedExtent() { count_freed(ExtentMemory::nbytes()); }
};

class FuzzMemory final : public PayloadMemory {
 public:
  char* allocate(size_t request, uint64_t nbytes) override {
    owned_.push_back(std::make_unique<char[]>(nbytes));
    payloads[request] = {owned_.back().get(), nbytes};
    return owned_.back().get();
  }
  void adopt(size_t request, char* data, uint64_t nbytes, std::shared_ptr<ExtentMemory> extent) override {
    payloads[request] = {data, nbytes};
    extents_.push_back(std::move(extent));
  }
  std::shared_ptr<ExtentMemory> map_extent(uint64_t file_offset, uint64_t nbytes) override {
    return std::make_shared<CountedExtent>(file_offset, nbytes);
  }
  std::map<size_t, std::pair<char*, uint64_t>> payloads;

 private:
  std::vector<std::unique_ptr<char[]>> owned_;
  std::vector<std::shared_ptr<ExtentMemory>> extents_;
};

// In memory, so that a million files cost no disk.
int file_of(const std::string& archive) {
  static const int fd = memfd_create("archive_fuzz", MFD_CLOEXEC);
  promise(fd >= 0 && ftruncate(fd, 0) == 0 &&
              pwrite(fd, archive.data(), archive.size(), 0) == static_cast<ssize_t>(archive.size()),
          "no memory file");
  return fd;
}

// Runs what may refuse the archive; anything else that is thrown ends the process.
bool accepted(const std::function<void()>& action) {
  try {
    action();
    return true;
  } catch (const CorruptArchive&) {
  } catch (const UnexpectedEnd&) {
  }
  return false;
}

void read_payloads(const std::string& archive, const Directory& directory, PositionalSource& source,
                   const std::vector<size_t>& records, uint64_t span_nbytes) {
  const auto no_watch = [](uint64_t, uint64_t) {};
  FuzzMemory memory;
  std::vector<size_t> wrong;
  std::vector<uint32_t> crcs;
  const bool loaded =
      accepted([&] { wrong = load_payloads(directory, source, records, memory, true, {1, span_nbytes}, no_watch); });
  const bool summed =
      accepted([&] { crcs = payload_checksums(directory, source, records, {1, span_nbytes}, no_watch); });
  promise(loaded == summed, "loaded but not checksummed, or the other way round");
  std::vector<uint64_t> sizes;
  for (const size_t record : records) sizes.push_back(directory[record].nbytes);
  LateDevice device(sizes);
  std::vector<size_t> wrong_on_device;
  const bool moved = accepted([&] {
    wrong_on_device = load_payloads_onto(directory, source, records, device, true, {1, span_nbytes}, no_watch);
  });
  promise(loaded == moved && device.sound, "loaded but not onto a device, or the other way round");
  if (!loaded) return;
  promise(memory.payloads.size() == records.size(), "a payload is missing");
  promise(wrong == wrong_on_device, "another checksum on the way to a device");
  for (size_t i = 0; i < records.size(); ++i) {
    const auto& [data, nbytes] = memory.payloads.at(i);
    const uint64_t offset = directory.payload_offset(records[i], &archive[directory[records[i]].header_offset]);
    promise(nbytes == directory[records[i]].nbytes, "a payload of another size");
    promise(offset + nbytes <= archive.size(), "a payload outside the file");
    promise(nbytes == 0 || std::memcmp(data, &archive[offset], nbytes) == 0, "other bytes than in the file");
    promise(nbytes == 0 || device.payloads[i].compare(0, nbytes, &archive[offset], nbytes) == 0,
            "other bytes on the device than in the file");
    promise(crcs[i] == crc32(0, archive.data() + offset, nbytes), "another checksum than that of the bytes");
    const bool is_wrong = std::find(wrong.begin(), wrong.end(), records[i]) != wrong.end();
    promise(is_wrong == (crcs[i] != directory[records[i]].crc32), "a wrong checksum passed, or a right one did not");
  }
}

size_t read_archive(const std::string& archive) {
  PositionalSource source(file_of(archive), DirectIo::kAuto);
  std::unique_ptr<Directory> directory;
  if (!accepted([&] { directory = std::make_unique<Directory>(read_directory(source)); })) return 0;
  std::vector<size_t> stored, sound;
  uint64_t total_nbytes = 0;
  for (size_t record = 0; record < directory->num_records(); ++record) {
    const DirectoryRecord& at = (*directory)[record];
    total_nbytes += at.stored_nbytes;
    promise(at.nbytes / 1032 <= at.stored_nbytes, "a record larger than deflate can make it");
    bool readable = false;
    accepted([&] {
      const uint64_t offset = read_payload_offset(*directory, source, record);
      promise(offset <= archive.size() && at.stored_nbytes <= archive.size() - offset, "a record outside the file");
      std::string last(std::min<uint64_t>(at.stored_nbytes, 3), '\0');
      read_stored(*directory, source, record, at.stored_nbytes - last.size(), last.size(), &last[0]);
      readable = true;
    });
    if (at.compressed) continue;
    stored.push_back(record);
    if (readable) sound.push_back(record);
  }
  promise(total_nbytes <= archive.size(), "records of more bytes than the file");
  for (const uint64_t span_nbytes : {uint64_t{4096}, uint64_t{0}}) {
    read_payloads(archive, *directory, source, sound, span_nbytes);
    if (stored.size() != sound.size()) read_payloads(archive, *directory, source, stored, span_nbytes);
    std::vector<size_t> some;
    for (size_t i = sound.size(); i > 0; i -= std::min<size_t>(i, 2)) some.push_back(sound[i - 1]);
    read_payloads(archive, *directory, source, some, span_nbytes);
  }
  return directory->num_records();
}

}  // namespace

size_t read_whole_archive(const std::string& archive) {
  // As many slots as a read onto a device uses, which small archives do not fill: the pool keeps them.
  static const bool has_slots = [] {
    const SlotPool::Handle one = SlotPool::host().acquire(), other = SlotPool::host().acquire();
    return one.data() != other.data();
  }();
  promise(has_slots, "a slot was given away twice");
  const uint64_t before = allocated_nbytes;
  peak_nbytes = before;
  const size_t num_records = read_archive(archive);
  promise(peak_nbytes - before <= archive.size() + (64u << 20), "more memory than the file's size + 64 MiB");
#ifndef SDIO_LIBFUZZER       // which allocates in hooks of its own
  static bool warm = false;  // the first one leaves tables and pools of the process
  promise(!warm || allocated_nbytes == before, "memory that nobody gave back");
  warm = true;
#endif
  return num_records;
}

}  // namespace sdio

// Every allocation of the process is counted.
void* operator new(size_t nbytes) {
  void* const memory = std::malloc(nbytes == 0 ? 1 : nbytes);
  if (memory == nullptr) throw std::bad_alloc();
  sdio::count_allocated(malloc_usable_size(memory));
  return memory;
}
void operator delete(void* memory) noexcept {
  if (memory == nullptr) return;
  sdio::count_freed(malloc_usable_size(memory));
  std::free(memory);
}
void* operator new[](size_t nbytes) { return operator new(nbytes); }
void operator delete[](void* memory) noexcept { operator delete(memory); }
void operator delete(void* memory, size_t) noexcept { operator delete(memory); }
void operator delete[](void* memory, size_t) noexcept { operator delete(memory); }
