// csrc/checksum/sha256: published sums, and every implementation that this CPU supports against the portable one.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "checksum/sha256.h"

namespace sdio {
namespace {

std::string hex(const Sha256::Sum& sum) {
  std::string text;
  for (const uint8_t byte : sum) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

class Sha256Variant : public testing::TestWithParam<Sha256Implementation> {
 protected:
  void SetUp() override {
    if (!GetParam().supported) GTEST_SKIP() << "not on this CPU";
  }

  static std::string sum_of(const std::string& bytes) {
    Sha256 hash(GetParam().compress);
    hash.update(bytes.data(), bytes.size());
    return hex(hash.finish());
  }
};

// FIPS 180-4's examples, as NIST publishes them (CSRC, "Examples with Intermediate Values").
TEST_P(Sha256Variant, PublishedSums) {
  EXPECT_EQ(sum_of(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sum_of("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sum_of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sum_of(std::string(1000000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_P(Sha256Variant, SameSumInAnyPieces) {
  std::mt19937 random(7);
  for (size_t nbytes = 0; nbytes < 300; ++nbytes) {
    std::string bytes(nbytes, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    Sha256 whole(sha256_implementations().back().compress);
    whole.update(bytes.data(), bytes.size());
    Sha256 in_pieces(GetParam().compress);
    for (size_t done = 0; done < nbytes;) {
      const size_t piece = std::min<size_t>(random() % 150, nbytes - done);
      const std::vector<char> at_any_address(bytes.begin() + static_cast<std::ptrdiff_t>(done),
                                             bytes.begin() + static_cast<std::ptrdiff_t>(done + piece));
      in_pieces.update(at_any_address.data(), piece);
      done += piece;
    }
    ASSERT_EQ(hex(in_pieces.finish()), hex(whole.finish())) << nbytes;
  }
}

TEST_P(Sha256Variant, Zeros) {
  for (const size_t nbytes : {size_t{0}, size_t{1}, size_t{4096}, size_t{100003}}) {
    Sha256 hash(GetParam().compress);
    hash.update_zeros(nbytes);
    EXPECT_EQ(hex(hash.finish()), sum_of(std::string(nbytes, '\0')));
  }
}

std::string variant_name(const testing::TestParamInfo<Sha256Implementation>& info) {
  std::string name = info.param.name;
  for (char& c : name) c = c == '-' ? '_' : c;
  return name;
}

INSTANTIATE_TEST_SUITE_P(Every, Sha256Variant, testing::ValuesIn(sha256_implementations()), variant_name);

}  // namespace
}  // namespace sdio
