// Differential tests of csrc/checksum: every implementation that this CPU supports against a
// bitwise CRC. STATEDICT_IO_TEST_SEED=<n> repeats a run; a failure prints the seed.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "checksum/crc32.h"

namespace {

using Bytes = std::vector<uint8_t>;

// Above this length an implementation may copy in another way; the tests go to both sides of it.
constexpr size_t kStreamingNbytes = 256 * 1024;
constexpr size_t kMaxShortNbytes = 1100;
constexpr size_t kCacheLine = 64;

uint32_t reference_byte(uint32_t crc, uint8_t byte) {
  uint32_t state = ~crc ^ byte;
  for (int bit = 0; bit < 8; ++bit) state = (state >> 1) ^ ((state & 1U) != 0 ? 0xEDB88320U : 0U);
  return ~state;
}

uint32_t reference(uint32_t crc, const uint8_t* data, size_t nbytes) {
  for (size_t i = 0; i < nbytes; ++i) crc = reference_byte(crc, data[i]);
  return crc;
}

uint64_t choose_seed() {
  if (const char* const text = std::getenv("STATEDICT_IO_TEST_SEED")) {
    return std::strtoull(text, nullptr, 0);
  }
  return std::random_device{}();
}

uint64_t seed() {
  static const uint64_t chosen = choose_seed();
  return chosen;
}

class Random {
 public:
  uint64_t below(uint64_t end) { return std::uniform_int_distribution<uint64_t>(0, end - 1)(engine_); }
  uint32_t word() { return static_cast<uint32_t>(engine_()); }
  Bytes bytes(size_t nbytes) {
    Bytes result(nbytes);
    for (auto& byte : result) byte = static_cast<uint8_t>(engine_());
    return result;
  }

 private:
  std::mt19937_64 engine_{seed()};
};

// Memory between two pages that must not be touched.
class GuardedPages {
 public:
  explicit GuardedPages(size_t min_nbytes)
      : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), nbytes_((min_nbytes + page_ - 1) / page_ * page_) {
    void* const mapped = mmap(nullptr, nbytes_ + 2 * page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) std::abort();
    mapped_ = static_cast<uint8_t*>(mapped);
    if (mprotect(mapped_, page_, PROT_NONE) != 0) std::abort();
    if (mprotect(mapped_ + page_ + nbytes_, page_, PROT_NONE) != 0) std::abort();
  }
  GuardedPages(const GuardedPages&) = delete;
  GuardedPages& operator=(const GuardedPages&) = delete;
  ~GuardedPages() { munmap(mapped_, nbytes_ + 2 * page_); }

  uint8_t* first(size_t) { return mapped_ + page_; }
  uint8_t* last(size_t nbytes) { return mapped_ + page_ + nbytes_ - nbytes; }

 private:
  size_t page_;
  size_t nbytes_;
  uint8_t* mapped_ = nullptr;
};

// A destination of copies: `nbytes` at any alignment, with a margin whose bytes must stay.
class Destination {
 public:
  Destination(size_t nbytes, size_t alignment_offset) : nbytes_(nbytes) {
    memory_.assign(nbytes + 4 * kCacheLine, kUntouched);
    const auto misalignment = reinterpret_cast<uintptr_t>(memory_.data()) % kCacheLine;
    begin_ = 2 * kCacheLine - misalignment + alignment_offset;
  }
  uint8_t* data() { return memory_.data() + begin_; }

  void expect_holds(const uint8_t* expected) {
    EXPECT_TRUE(nbytes_ == 0 || std::memcmp(data(), expected, nbytes_) == 0) << "bytes differ";
    const auto is_untouched = [](uint8_t byte) { return byte == kUntouched; };
    const auto end = memory_.begin() + static_cast<std::ptrdiff_t>(begin_ + nbytes_);
    EXPECT_TRUE(std::all_of(memory_.begin(), memory_.begin() + static_cast<std::ptrdiff_t>(begin_), is_untouched))
        << "written before the destination";
    EXPECT_TRUE(std::all_of(end, memory_.end(), is_untouched)) << "written after the destination";
  }

 private:
  static constexpr uint8_t kUntouched = 0xA5;
  size_t nbytes_;
  size_t begin_ = 0;
  Bytes memory_;
};

class SeededTest : public ::testing::Test {
 protected:
  Random random_;

 private:
  ::testing::ScopedTrace trace_{__FILE__, __LINE__, "STATEDICT_IO_TEST_SEED=" + std::to_string(seed())};
};

class Implementation : public SeededTest, public ::testing::WithParamInterface<sdio::Crc32Implementation> {
 protected:
  void SetUp() override {
    if (!GetParam().supported) GTEST_SKIP() << "this CPU does not support " << GetParam().name;
  }
  static uint32_t extend(uint32_t crc, const void* data, size_t nbytes) { return GetParam().extend(crc, data, nbytes); }
  static uint32_t copy(uint32_t crc, void* dst, const void* src, size_t nbytes) {
    return GetParam().copy(crc, dst, src, nbytes);
  }
};

std::string gtest_name(const ::testing::TestParamInfo<sdio::Crc32Implementation>& info) {
  std::string name = info.param.name;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Every, Implementation, ::testing::ValuesIn(sdio::crc32_implementations()), gtest_name);

TEST_P(Implementation, KnowsPublishedValues) {
  const std::string digits = "123456789";
  const std::string fox = "The quick brown fox jumps over the lazy dog";
  const Bytes zeros(32, 0x00);
  const Bytes ones(32, 0xFF);
  EXPECT_EQ(extend(0, digits.data(), digits.size()), 0xCBF43926U);
  EXPECT_EQ(extend(0, fox.data(), fox.size()), 0x414FA339U);
  EXPECT_EQ(extend(0, zeros.data(), zeros.size()), 0x190A55ADU);
  EXPECT_EQ(extend(0, ones.data(), ones.size()), 0xFF6CAB0BU);
}

TEST_P(Implementation, LeavesCrcOfNothing) {
  uint8_t byte = 0;
  for (const uint32_t crc : {0U, 1U, 0xFFFFFFFFU, random_.word()}) {
    EXPECT_EQ(extend(crc, &byte, 0), crc);
    EXPECT_EQ(extend(crc, nullptr, 0), crc);
    EXPECT_EQ(copy(crc, &byte, &byte + 1, 0), crc);
    EXPECT_EQ(copy(crc, nullptr, nullptr, 0), crc);
  }
}

TEST_P(Implementation, ExtendsEveryShortLengthAtEveryAlignment) {
  const Bytes data = random_.bytes(kMaxShortNbytes + 2 * kCacheLine);
  const uint8_t* const aligned = data.data() + (0 - reinterpret_cast<uintptr_t>(data.data())) % kCacheLine;
  for (size_t alignment = 0; alignment < kCacheLine; ++alignment) {
    const uint32_t initial = random_.word();
    uint32_t expected = initial;
    for (size_t nbytes = 0; nbytes <= kMaxShortNbytes; ++nbytes) {
      ASSERT_EQ(extend(initial, aligned + alignment, nbytes), expected) << nbytes << " bytes at " << alignment;
      expected = reference_byte(expected, aligned[alignment + nbytes]);
    }
  }
}

TEST_P(Implementation, CopiesEveryShortLength) {
  const Bytes data = random_.bytes(kMaxShortNbytes + kCacheLine);
  for (size_t nbytes = 0; nbytes <= kMaxShortNbytes; ++nbytes) {
    for (int repeat = 0; repeat < 4; ++repeat) {
      const uint8_t* const src = data.data() + random_.below(kCacheLine);
      const size_t alignment = random_.below(kCacheLine);
      const uint32_t initial = random_.word();
      Destination dst(nbytes, alignment);
      ASSERT_EQ(copy(initial, dst.data(), src, nbytes), reference(initial, src, nbytes))
          << nbytes << " bytes to " << alignment;
      dst.expect_holds(src);
      ASSERT_FALSE(HasFailure()) << nbytes << " bytes to " << alignment;
    }
  }
}

TEST_P(Implementation, CopiesAroundTheStreamingLengthToEveryAlignment) {
  const Bytes data = random_.bytes(kStreamingNbytes + 1024);
  for (size_t alignment = 0; alignment < kCacheLine; ++alignment) {
    const size_t offset = random_.below(kCacheLine);
    const uint8_t* const src = data.data() + offset;
    const size_t nbytes = kStreamingNbytes + random_.below(800) - 256;
    const uint32_t initial = random_.word();
    Destination dst(nbytes, alignment);
    ASSERT_EQ(copy(initial, dst.data(), src, nbytes), extend(initial, src, nbytes))
        << nbytes << " bytes to " << alignment;
    dst.expect_holds(src);
    ASSERT_FALSE(HasFailure()) << nbytes << " bytes to " << alignment;
  }
}

TEST_P(Implementation, AgreesOnRandomLargeLengths) {
  const Bytes data = random_.bytes((size_t{3} << 20) + kCacheLine);
  for (int repeat = 0; repeat < 8; ++repeat) {
    const uint8_t* const src = data.data() + random_.below(kCacheLine);
    const size_t nbytes = random_.below(size_t{3} << 20);
    const uint32_t initial = random_.word();
    const uint32_t expected = reference(initial, src, nbytes);
    ASSERT_EQ(extend(initial, src, nbytes), expected) << nbytes << " bytes";
    Destination dst(nbytes, random_.below(kCacheLine));
    ASSERT_EQ(copy(initial, dst.data(), src, nbytes), expected) << nbytes << " bytes";
    dst.expect_holds(src);
  }
}

TEST_P(Implementation, DoesNotDependOnSplits) {
  const Bytes data = random_.bytes(kStreamingNbytes * 2);
  const uint32_t initial = random_.word();
  const uint32_t expected = reference(initial, data.data(), data.size());
  for (int repeat = 0; repeat < 50; ++repeat) {
    Destination dst(data.size(), random_.below(kCacheLine));
    uint32_t crc = initial;
    for (size_t i = 0; i < data.size();) {
      const uint64_t magnitude = uint64_t{1} << random_.below(20);
      const size_t nbytes = std::min<size_t>(data.size() - i, random_.below(magnitude + 1));
      crc = random_.below(2) == 0 ? extend(crc, data.data() + i, nbytes)
                                  : copy(crc, dst.data() + i, data.data() + i, nbytes);
      i += nbytes;
    }
    ASSERT_EQ(crc, expected);
  }
}

TEST_P(Implementation, TouchesNothingOutside) {
  const size_t large = kStreamingNbytes + random_.below(5000);
  GuardedPages src_pages(large);
  GuardedPages dst_pages(large);
  std::vector<size_t> lengths(kMaxShortNbytes + 1);
  for (size_t nbytes = 0; nbytes <= kMaxShortNbytes; ++nbytes) lengths[nbytes] = nbytes;
  lengths.push_back(large);
  for (const size_t nbytes : lengths) {
    const Bytes data = random_.bytes(nbytes);
    const uint32_t expected = reference(0, data.data(), nbytes);
    for (const auto src_place : {&GuardedPages::first, &GuardedPages::last}) {
      uint8_t* const src = (src_pages.*src_place)(nbytes);
      std::copy(data.begin(), data.end(), src);
      ASSERT_EQ(extend(0, src, nbytes), expected) << nbytes << " bytes";
      for (const auto dst_place : {&GuardedPages::first, &GuardedPages::last}) {
        uint8_t* const dst = (dst_pages.*dst_place)(nbytes);
        ASSERT_EQ(copy(0, dst, src, nbytes), expected) << nbytes << " bytes";
        ASSERT_TRUE(std::equal(data.begin(), data.end(), dst)) << nbytes << " bytes";
      }
    }
  }
}

class Crc32 : public SeededTest {};

TEST_F(Crc32, PublicFunctionsUseTheActiveImplementation) {
  const Bytes data = random_.bytes(10000);
  Bytes copied(data.size());
  const uint32_t expected = reference(0, data.data(), data.size());
  EXPECT_EQ(sdio::crc32(0, data.data(), data.size()), expected);
  EXPECT_EQ(sdio::crc32_copy(0, copied.data(), data.data(), data.size()), expected);
  EXPECT_EQ(copied, data);
}

TEST_F(Crc32, ListsThePortableImplementationLast) {
  const auto& implementations = sdio::crc32_implementations();
  ASSERT_FALSE(implementations.empty());
  EXPECT_STREQ(implementations.back().name, "portable");
  EXPECT_TRUE(implementations.back().supported);
}

TEST_F(Crc32, ShiftIsTheCrcOverZeros) {
  // crc(a || zeros) and crc(zeros) differ by the shifted crc(a), for a as long as needed.
  for (size_t nbytes_after = 0; nbytes_after < 3000; ++nbytes_after) {
    const Bytes piece = random_.bytes(random_.below(40));
    const Bytes zeros(nbytes_after, 0);
    const uint32_t crc = reference(0, piece.data(), piece.size());
    const uint32_t whole = reference(crc, zeros.data(), zeros.size());
    const uint32_t alone = reference(0, zeros.data(), zeros.size());
    ASSERT_EQ(sdio::crc32_shift(crc, nbytes_after), whole ^ alone) << nbytes_after;
  }
}

TEST_F(Crc32, ShiftsAdd) {
  for (int repeat = 0; repeat < 2000; ++repeat) {
    const uint32_t crc = random_.word();
    const uint64_t first = random_.below(uint64_t{1} << random_.below(63));
    const uint64_t second = random_.below(uint64_t{1} << random_.below(63));
    ASSERT_EQ(sdio::crc32_shift(sdio::crc32_shift(crc, first), second), sdio::crc32_shift(crc, first + second))
        << first << " + " << second;
  }
}

TEST_F(Crc32, ShiftsBeyondFourGibibytesByDoubling) {
  uint32_t crc = random_.word();
  const uint32_t start = crc;
  const uint64_t nbytes = (uint64_t{5} << 30) + 12345;
  const uint64_t step = nbytes / 4096;
  for (uint64_t i = 0; i < 4096; ++i) crc = sdio::crc32_shift(crc, step);
  crc = sdio::crc32_shift(crc, nbytes % 4096);
  EXPECT_EQ(sdio::crc32_shift(start, nbytes), crc);
  // x^(2^32 - 1) == 1.
  EXPECT_EQ(sdio::crc32_shift(start, 0xFFFFFFFFU), start);
  EXPECT_EQ(sdio::crc32_shift(start, UINT64_MAX), start);
  EXPECT_EQ(sdio::crc32_shift(start, 0), start);
}

TEST_F(Crc32, ContributionsAddUpInAnyOrder) {
  const Bytes data = random_.bytes(100000);
  const uint32_t expected = reference(0, data.data(), data.size());
  std::vector<size_t> cuts = {0, data.size()};
  for (int i = 0; i < 20; ++i) cuts.push_back(random_.below(data.size() + 1));
  std::sort(cuts.begin(), cuts.end());
  std::vector<uint32_t> contributions;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    const uint32_t crc = sdio::crc32(0, data.data() + cuts[i], cuts[i + 1] - cuts[i]);
    contributions.push_back(sdio::crc32_shift(crc, data.size() - cuts[i + 1]));
  }
  uint32_t forwards = 0;
  uint32_t backwards = 0;
  for (const uint32_t each : contributions) forwards ^= each;
  for (auto it = contributions.rbegin(); it != contributions.rend(); ++it) backwards ^= *it;
  EXPECT_EQ(forwards, expected);
  EXPECT_EQ(backwards, expected);
}

// The choice is made once a process, so each of these runs in one of its own.
class Crc32DeathTest : public ::testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
  void TearDown() override { unsetenv("STATEDICT_IO_SIMD"); }

  static void expect_active(const std::string& wanted, const std::string& name) {
    setenv("STATEDICT_IO_SIMD", wanted.c_str(), 1);
    EXPECT_EXIT(std::_Exit(sdio::crc32_active_name() == name ? 0 : 1), ::testing::ExitedWithCode(0), "") << wanted;
  }
  static std::string automatic_choice() {
    for (const auto& each : sdio::crc32_implementations()) {
      if (each.supported) return each.name;
    }
    return {};
  }
};

TEST_F(Crc32DeathTest, TheEnvironmentForcesASupportedImplementation) {
  for (const auto& each : sdio::crc32_implementations()) {
    expect_active(each.name, each.supported ? each.name : automatic_choice());
  }
}

TEST_F(Crc32DeathTest, TheEnvironmentCannotAskForTheUnknown) {
  for (const char* const wanted : {"", "no-such-thing", "Portable", "portable "}) {
    expect_active(wanted, automatic_choice());
  }
}

}  // namespace
