#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "pickle/memo.h"
#include "pickle/tensor_calls.h"

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

TEST(WithoutUnusedPuts, AnErrorStaysAnError) {
  for (const std::string& pickle : {"\x80\x02q\x00]."s, "q\x00]."s,
                                    "\x80\x02](q\x00K\x01"
                                    "e."s}) {
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

// Two tensors as torch.save writes them, after without_unused_puts.
const std::string kTwoTensors =
    "\x80\x02](ctorch._utils\n_rebuild_tensor_v2\nq\x01((X\x07\x00\x00\x00storageq\x02"
    "ctorch\nFloatStorage\nq\x03X\x01\x00\x00\x00"
    "0X\x03\x00\x00\x00"
    "cpuq\x04K\x06tQK\x00K\x02K\x03\x86K\x03K\x01\x86\x89"
    "ccollections\nOrderedDict\nq\x05)RtR"
    "h\x01((h\x02h\x03X\x01\x00\x00\x00"
    "1h\x04M\x00\x01tQK\x07(K\x01K\x02K\x03K\x04tJ\x09\x00\x00\x00\x85\x88h\x05)RtRe."s;

TEST(WithoutTensorCalls, TakesOutWhatIsSpelledWithTheMemo) {
  const sdio::AbridgedPickle abridged = sdio::without_tensor_calls(kTwoTensors);
  ASSERT_EQ(abridged.calls.size(), 1u);
  const sdio::TensorCall& call = abridged.calls[0];
  EXPECT_EQ(call.storage_type, "torch FloatStorage");
  EXPECT_EQ(call.key, "1");
  EXPECT_EQ(call.location, "cpu");
  EXPECT_EQ(call.numel, 256u);
  EXPECT_EQ(call.offset, 7u);
  EXPECT_EQ(call.size, (std::vector<uint64_t>{1, 2, 3, 4}));
  EXPECT_EQ(call.stride, std::vector<uint64_t>{9});
  EXPECT_TRUE(call.requires_grad);
  const std::string replacement = "J\x00\x00\x00\x00Qe."s;
  EXPECT_EQ(abridged.stream, kTwoTensors.substr(0, kTwoTensors.rfind("h\x01("s)) + replacement);
}

TEST(WithoutTensorCalls, NoOtherPersistentIdIsANumber) {
  for (const std::string& forged : {"K\x00Q"s, "J\x00\x00\x00\x00Q"s, "h\x02Q"s, "K\x00K\x00tq\x09Q"s}) {
    std::string stream = kTwoTensors;
    stream.insert(stream.size() - 2, forged);
    const sdio::AbridgedPickle abridged = sdio::without_tensor_calls(stream);
    EXPECT_EQ(abridged.stream, stream);
    EXPECT_TRUE(abridged.calls.empty());
  }
}

TEST(WithoutTensorCalls, EveryPrefixComesBackAsItIs) {
  for (size_t nbytes = 0; nbytes < kTwoTensors.size(); ++nbytes) {
    const std::string prefix = kTwoTensors.substr(0, nbytes);
    const sdio::AbridgedPickle abridged = sdio::without_tensor_calls(prefix);
    EXPECT_EQ(abridged.stream, prefix);
    EXPECT_TRUE(abridged.calls.empty());
  }
}

TEST(WithoutTensorCalls, AnyByteMayBeAnother) {
  for (size_t at = 0; at < kTwoTensors.size(); ++at) {
    for (int value = 0; value < 256; ++value) {
      std::string damaged = kTwoTensors;
      damaged[at] = static_cast<char>(value);
      const sdio::AbridgedPickle abridged = sdio::without_tensor_calls(damaged);
      // Up to its end, which may be earlier now.
      if (abridged.calls.empty()) EXPECT_EQ(abridged.stream, damaged.substr(0, abridged.stream.size()));
    }
  }
}

}  // namespace
