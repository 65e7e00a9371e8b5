// Throughput of csrc/checksum next to zlib, ISA-L and memcpy. Prints one JSON object; a rate is the
// median over interleaved rounds, in GB/s (1e9 bytes) of source bytes.
//
//   apt-get install libisal-dev zlib1g-dev
//   g++ -std=c++17 -O2 -Icsrc -o crc32_bench benchmarks/cpp/crc32_bench.cpp csrc/checksum/*.cpp -lisal -lz
//   ./crc32_bench [rounds, 7 unless given] [MiB of the source in RAM, 1024 unless given]
//
// Workloads: "<n>" reads (and for copies writes) the same n bytes again and again, from the cache;
// "ram-1-slot" and "ram-8-slots" go once over the source in chunks of 8 MiB, copying to one or
// eight destinations of 8 MiB in turn: one stays in most last-level caches, eight do not. All
// memory is in huge pages where the system grants them.
#include <isa-l/crc.h>
#include <sys/mman.h>
#include <zlib.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "checksum/crc32.h"

namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kChunkNbytes = 8 * kMiB;
constexpr size_t kSlots = 8;
constexpr size_t kCachedNbytesPerRound = 32 * kMiB;

uint8_t* allocate(size_t nbytes) {
  constexpr size_t kHugePage = 2 * kMiB;
  void* const memory = std::aligned_alloc(kHugePage, (nbytes + kHugePage - 1) / kHugePage * kHugePage);
  if (memory == nullptr) std::abort();
  madvise(memory, nbytes, MADV_HUGEPAGE);
  return static_cast<uint8_t*>(memory);
}

volatile uint32_t g_sink;  // Keeps the checksums from being optimized away.

struct Contender {
  std::string name;
  // The loop is inside, so that only the operation's own cost is repeated.
  std::function<void(uint8_t* dst, const uint8_t* src, size_t nbytes, size_t repeats)> run;
  std::vector<double> rates = {};
};

template <typename F>
Contender make_contender(const std::string& name, F operation) {
  return {name, [operation](uint8_t* dst, const uint8_t* src, size_t nbytes, size_t repeats) {
            for (size_t i = 0; i < repeats; ++i) operation(dst, src, nbytes);
          }};
}

std::vector<Contender> make_contenders() {
  std::vector<Contender> contenders;
  contenders.push_back(make_contender(
      "crc isa-l", [](uint8_t*, const uint8_t* src, size_t nbytes) { g_sink = crc32_gzip_refl(0, src, nbytes); }));
  contenders.push_back(make_contender("crc zlib", [](uint8_t*, const uint8_t* src, size_t nbytes) {
    g_sink = static_cast<uint32_t>(crc32_z(0, src, nbytes));
  }));
  for (const auto& each : sdio::crc32_implementations()) {
    if (!each.supported) continue;
    contenders.push_back(make_contender(
        std::string("crc ") + each.name,
        [extend = each.extend](uint8_t*, const uint8_t* src, size_t nbytes) { g_sink = extend(0, src, nbytes); }));
  }
  contenders.push_back(make_contender("memcpy", [](uint8_t* dst, const uint8_t* src, size_t nbytes) {
    std::memcpy(dst, src, nbytes);
    asm volatile("" : : "r"(dst) : "memory");
  }));
  contenders.push_back(make_contender("memcpy then crc", [](uint8_t* dst, const uint8_t* src, size_t nbytes) {
    std::memcpy(dst, src, nbytes);
    g_sink = sdio::crc32(0, dst, nbytes);
  }));
  for (const auto& each : sdio::crc32_implementations()) {
    if (!each.supported) continue;
    contenders.push_back(make_contender(
        std::string("copy ") + each.name,
        [copy = each.copy](uint8_t* dst, const uint8_t* src, size_t nbytes) { g_sink = copy(0, dst, src, nbytes); }));
  }
  return contenders;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Runs `pass` (which handles `nbytes` bytes) for every contender in turn, `rounds` times.
void measure(const std::string& workload, int rounds, size_t nbytes, bool is_last,
             const std::function<void(const Contender&)>& pass) {
  auto contenders = make_contenders();
  for (int round = 0; round < rounds; ++round) {
    for (auto& each : contenders) {
      const auto start = std::chrono::steady_clock::now();
      pass(each);
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      each.rates.push_back(static_cast<double>(nbytes) / elapsed.count() / 1e9);
    }
  }
  std::printf("    \"%s\": {", workload.c_str());
  for (size_t i = 0; i < contenders.size(); ++i) {
    std::printf("%s\"%s\": %.2f", i == 0 ? "" : ", ", contenders[i].name.c_str(), median(contenders[i].rates));
  }
  std::printf("}%s\n", is_last ? "" : ",");
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = std::max(1, argc > 1 ? std::atoi(argv[1]) : 7);
  const auto mib = static_cast<size_t>(std::max(8, argc > 2 ? std::atoi(argv[2]) : 1024));
  const size_t ram_nbytes = mib * kMiB / kChunkNbytes * kChunkNbytes;
  uint8_t* const src = allocate(ram_nbytes);
  uint8_t* const slots = allocate(kSlots * kChunkNbytes);
  std::mt19937_64 engine(1);
  for (size_t i = 0; i < ram_nbytes; i += 8) {
    const uint64_t word = engine();
    std::memcpy(src + i, &word, 8);
  }
  std::memset(slots, 1, kSlots * kChunkNbytes);

  std::printf("{\n  \"active\": \"%s\",\n  \"rounds\": %d,\n  \"gb_per_s\": {\n", sdio::crc32_active_name(), rounds);
  for (const size_t nbytes : {size_t{64}, size_t{1024}, 64 * size_t{1024}, kMiB}) {
    const size_t repeats = kCachedNbytesPerRound / nbytes;
    measure(std::to_string(nbytes), rounds, nbytes * repeats, false,
            [&](const Contender& each) { each.run(slots, src, nbytes, repeats); });
  }
  for (const size_t n_slots : {size_t{1}, kSlots}) {
    measure("ram-" + std::to_string(n_slots) + (n_slots == 1 ? "-slot" : "-slots"), rounds, ram_nbytes,
            n_slots == kSlots, [&](const Contender& each) {
              size_t slot = 0;
              for (size_t i = 0; i < ram_nbytes; i += kChunkNbytes) {
                each.run(slots + slot * kChunkNbytes, src + i, kChunkNbytes, 1);
                slot = (slot + 1) % n_slots;
              }
            });
  }
  std::printf("  }\n}\n");
  std::free(slots);
  std::free(src);
}
