#include <gtest/gtest.h>

#include <string>

#include "pickle/memo.h"

namespace {

using namespace std::string_literals;

std::string lean(const std::string& pickle) { return sdio::without_unused_puts(pickle.data(), pickle.size()); }

TEST(WithoutUnusedPuts, DropsWhatNothingAsksFor) {
  EXPECT_EQ(lean("\x80\x02]q\x00K\x05"s + "a."s), "\x80\x02]K\x05"s + "a."s);
  EXPECT_EQ(lean("\x80\x02]q\x00h\x00"
                 "a."s),
            "\x80\x02]q\x00h\x00"
            "a."s);
  EXPECT_EQ(lean("\x80\x02]q\x00]q\x01h\x01"
                 "e."s),
            "\x80\x02]]q\x01h\x01"
            "e."s);
}

TEST(WithoutUnusedPuts, LongIndices) {
  const std::string put = "r\x10\x00\x00\x00"s, get = "j\x10\x00\x00\x00"s;
  EXPECT_EQ(lean("\x80\x02]"s + put +
                 "X\x0c\x00\x00\x00q\x00q\x00q\x00q\x00q\x00q\x00"
                 "a."s),
            "\x80\x02]X\x0c\x00\x00\x00q\x00q\x00q\x00q\x00q\x00q\x00"
            "a."s);
  EXPECT_EQ(lean("\x80\x02]"s + put + get + "aN."s), "\x80\x02]"s + put + get + "aN."s);
}

TEST(WithoutUnusedPuts, ArgumentsAreNoOpcodes) {
  const std::string text = "\x80\x02U\x04q\x00q\x00q\x07."s;
  EXPECT_EQ(lean(text), "\x80\x02U\x04q\x00q\x00."s);
  EXPECT_EQ(lean("cos\nq\x00q\x00\nq\x05."s), "cos\nq\x00q\x00\n."s);
}

TEST(WithoutUnusedPuts, LeavesAloneWhatItDoesNotKnow) {
  for (const std::string& pickle : {"]q\x00\x94."s, "(lp0\n."s, "]q\x00"s, "X\xff\xff\xff\xffq\x00."s, ""s, "q"s,
                                    "]r\xff\xff\xff\x7f."s, "cos\nq\x00."s, "\x80"s, "]q\x00\xff."s}) {
    EXPECT_EQ(lean(pickle), pickle);
  }
}

TEST(WithoutUnusedPuts, EveryPrefixComesBackAsItIs) {
  const std::string pickle =
      "\x80\x02}q\x00(X\x01\x00\x00\x00"
      "aq\x01K\x01U\x02xyq\x02h\x01u."s;
  for (size_t nbytes = 0; nbytes < pickle.size(); ++nbytes) {
    EXPECT_EQ(lean(pickle.substr(0, nbytes)), pickle.substr(0, nbytes));
  }
  EXPECT_LT(lean(pickle).size(), pickle.size());
}

}  // namespace
