// SHA-256 (FIPS 180-4), for sums that other programs compare: sha256sum, stores, model hubs.
//
// It is serial: a file's bytes have to come in order. The implementation is chosen once, at first use, from what the
// CPU supports; STATEDICT_IO_SIMD=portable asks for that one.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace sdio {

class Sha256 {
 public:
  using Sum = std::array<uint8_t, 32>;

  void update(const void* data, size_t nbytes) noexcept;
  void update_zeros(uint64_t nbytes) noexcept;
  Sum finish() noexcept;  // once, at the end

  // For tests: another implementation than that in use.
  using Compress = void (*)(uint32_t* state, const uint8_t* blocks, size_t num_blocks) noexcept;
  explicit Sha256(Compress compress) noexcept : compress_(compress) {}
  Sha256() noexcept;

 private:
  static constexpr size_t kBlockNbytes = 64;

  Compress compress_;
  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint64_t nbytes_ = 0;
  uint8_t block_[kBlockNbytes];  // of which nbytes_ % kBlockNbytes are there
};

struct Sha256Implementation {
  const char* name;
  bool supported;  // by this CPU; if not, it may not be called
  Sha256::Compress compress;
};

// Every implementation that was compiled in, fastest first, the portable one last.
const std::vector<Sha256Implementation>& sha256_implementations();

const char* sha256_active_name() noexcept;

}  // namespace sdio
