#include "pickle/tensor_calls.h"

#include <optional>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "pickle/opcodes.h"

namespace sdio {
namespace {

using pickle::Opcode;
using pickle::Stream;

// What the memo holds, as far as it matters: globals ("module\nname\n") and strings.
struct Bound {
  bool is_global;
  std::string_view text;
};

using Memo = std::unordered_map<uint32_t, Bound>;

constexpr std::string_view kRebuild = "torch._utils\n_rebuild_tensor_v2\n";
constexpr std::string_view kOrderedDict = "collections\nOrderedDict\n";

// Takes opcodes from a stream one by one; once one is not the expected, everything fails.
class Cursor {
 public:
  Cursor(const Stream& stream, const Memo& memo, size_t at) : stream_(stream), memo_(memo), at_(at) {}

  size_t at() const { return at_; }
  bool ok() const { return ok_; }

  void expect(char code) {
    if (next() != code) ok_ = false;
  }

  bool boolean() {
    const char code = next();
    if (code != '\x88' && code != '\x89') ok_ = false;
    return code == '\x88';
  }

  std::string_view global() { return bound(true); }
  std::string_view remembered_string() { return bound(false); }

  std::string_view string() {
    if (peek() != 'X') return bound(false);
    const size_t at = at_;
    next();
    return ok_ ? std::string_view(stream_.bytes() + at + 5, at_ - at - 5) : std::string_view();
  }

  // Not negative: torch writes no others here.
  uint64_t integer() {
    const size_t at = at_;
    const char code = next();
    if (!ok_) return 0;
    switch (code) {
      case 'K':
        return stream_.number(at + 1, 1);
      case 'M':
        return stream_.number(at + 1, 2);
      case 'J':
        return checked(stream_.number(at + 1, 4), 31);
      case '\x8a':
        return long_integer(at + 2, at_ - at - 2);
      default:
        ok_ = false;
        return 0;
    }
  }

  std::vector<uint64_t> integers() {
    std::vector<uint64_t> values;
    if (peek() == ')') {
      next();
      return values;
    }
    const bool marked = peek() == '(';
    if (marked) next();
    while (ok_) {
      switch (peek()) {
        case '\x85':
        case '\x86':
        case '\x87':
          if (marked || values.size() != static_cast<size_t>(peek() - '\x84')) ok_ = false;
          next();
          return values;
        case 't':
          if (!marked) ok_ = false;
          next();
          return values;
        default:
          values.push_back(integer());
      }
    }
    return values;
  }

 private:
  char peek() const { return ok_ && stream_.opcode(at_) ? stream_.code(at_) : '\0'; }

  char next() {
    const std::optional<Opcode> opcode = ok_ ? stream_.opcode(at_) : std::nullopt;
    if (!opcode) {
      ok_ = false;
      return '\0';
    }
    const char code = stream_.code(at_);
    at_ = opcode->end;
    return code;
  }

  std::string_view bound(bool is_global) {
    const std::optional<Opcode> opcode = ok_ ? stream_.opcode(at_) : std::nullopt;
    if (!opcode || opcode->kind != Opcode::Kind::kGet) {
      ok_ = false;
      return {};
    }
    const auto found = memo_.find(opcode->index);
    if (found == memo_.end() || found->second.is_global != is_global) {
      ok_ = false;
      return {};
    }
    at_ = opcode->end;
    return found->second.text;
  }

  uint64_t long_integer(size_t at, size_t nbytes) {
    if (nbytes > 8) {
      ok_ = false;
      return 0;
    }
    const size_t low_nbytes = nbytes < 4 ? nbytes : 4;
    const uint64_t high = stream_.number(at + low_nbytes, nbytes - low_nbytes);
    return checked(high << 32 | stream_.number(at, low_nbytes), nbytes == 0 ? 0 : 8 * nbytes - 1);
  }

  // Two's complement: with the highest bit set the number is negative.
  uint64_t checked(uint64_t value, size_t num_bits) {
    if (num_bits < 64 && value >> num_bits != 0) ok_ = false;
    return value;
  }

  const Stream& stream_;
  const Memo& memo_;
  size_t at_;
  bool ok_ = true;
};

struct FoundCall {
  TensorCall call;
  size_t end;
};

std::optional<FoundCall> tensor_call(const Stream& stream, const Memo& memo, size_t at) {
  Cursor cursor(stream, memo, at);
  FoundCall found;
  TensorCall& call = found.call;
  if (cursor.global() != kRebuild) return std::nullopt;
  cursor.expect('(');
  cursor.expect('(');
  if (cursor.remembered_string() != "storage") return std::nullopt;
  const std::string_view type = cursor.global();
  call.key = cursor.string();
  call.location = cursor.remembered_string();
  call.numel = cursor.integer();
  cursor.expect('t');
  cursor.expect('Q');
  call.offset = cursor.integer();
  call.size = cursor.integers();
  call.stride = cursor.integers();
  call.requires_grad = cursor.boolean();
  if (cursor.global() != kOrderedDict) return std::nullopt;
  for (const char code : {')', 'R', 't', 'R'}) cursor.expect(code);
  if (!cursor.ok()) return std::nullopt;
  call.storage_type = type.substr(0, type.size() - 1);
  call.storage_type[call.storage_type.find('\n')] = ' ';
  found.end = cursor.at();
  return found;
}

}  // namespace

AbridgedPickle without_tensor_calls(std::string stream_bytes) {
  const auto unchanged = [&] { return AbridgedPickle{std::move(stream_bytes), {}}; };
  const Stream stream(stream_bytes.data(), stream_bytes.size());
  AbridgedPickle abridged;
  abridged.stream.reserve(stream_bytes.size());
  Memo memo;
  std::unordered_set<uint32_t> put;
  std::optional<Bound> last;  // what is on top of the stack, where it matters
  char previous = '\0';       // the opcode before
  std::optional<Opcode> opcode;
  for (size_t at = 0; !opcode || opcode->kind != Opcode::Kind::kStop; at = opcode->end) {
    opcode = stream.opcode(at);
    if (!opcode) return unchanged();
    const char* const bytes = stream.bytes() + at;
    const size_t nbytes = opcode->end - at;
    if (opcode->kind == Opcode::Kind::kPut) {
      if (!put.insert(opcode->index).second) return unchanged();  // no pickler puts twice
      if (last) memo.emplace(opcode->index, *last);
    } else if (opcode->kind == Opcode::Kind::kGet) {
      if (std::optional<FoundCall> found = tensor_call(stream, memo, at)) {
        if (abridged.calls.size() > 0x7fffffff) return unchanged();  // the operand of J is signed
        const auto number = static_cast<uint32_t>(abridged.calls.size());
        abridged.stream += 'J';
        for (int shift = 0; shift < 32; shift += 8) abridged.stream += static_cast<char>(number >> shift & 0xff);
        abridged.stream += 'Q';
        abridged.calls.push_back(std::move(found->call));
        opcode->end = found->end;
        last.reset();
        previous = 'R';
        continue;
      }
    }
    // On top of the stack is a tuple then, which nobody takes for the number of a call.
    if (stream.code(at) == 'Q' && previous != 't') return unchanged();
    previous = stream.code(at);
    if (stream.code(at) == 'c') {
      last = Bound{true, {bytes + 1, nbytes - 1}};
    } else if (stream.code(at) == 'X') {
      last = Bound{false, {bytes + 5, nbytes - 5}};
    } else if (opcode->kind != Opcode::Kind::kPut) {
      last.reset();
    }
    abridged.stream.append(bytes, nbytes);
  }
  return abridged;
}

}  // namespace sdio
