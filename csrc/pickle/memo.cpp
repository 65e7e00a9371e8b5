#include "pickle/memo.h"

#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace sdio {
namespace {

struct Opcode {
  enum class Kind { kOther, kPut, kGet, kStop } kind = Kind::kOther;
  size_t end = 0;      // of its argument
  uint32_t index = 0;  // in the memo, of kPut and kGet
};

class Stream {
 public:
  Stream(const char* bytes, size_t nbytes) : bytes_(bytes), nbytes_(nbytes) {}

  // The opcode at `at`, or nothing where it is unknown or cut off.
  std::optional<Opcode> opcode(size_t at) const {
    if (at >= nbytes_) return std::nullopt;
    switch (bytes_[at]) {
      case '(':
      case 'N':
      case '\x88':
      case '\x89':
      case ')':
      case ']':
      case '}':
      case '\x8f':  // constants
      case 't':
      case '\x85':
      case '\x86':
      case '\x87':
      case 'a':
      case 'e':
      case 's':
      case 'u':  // containers
      case 'R':
      case 'b':
      case '\x81':
      case 'Q':
        return fixed(at, 0, Opcode::Kind::kOther);
      case '.':
        return fixed(at, 0, Opcode::Kind::kStop);
      case 'K':
      case '\x80':
        return fixed(at, 1, Opcode::Kind::kOther);
      case 'M':
        return fixed(at, 2, Opcode::Kind::kOther);
      case 'J':
        return fixed(at, 4, Opcode::Kind::kOther);
      case 'G':
        return fixed(at, 8, Opcode::Kind::kOther);
      case 'h':
        return fixed(at, 1, Opcode::Kind::kGet);
      case 'j':
        return fixed(at, 4, Opcode::Kind::kGet);
      case 'q':
        return fixed(at, 1, Opcode::Kind::kPut);
      case 'r':
        return fixed(at, 4, Opcode::Kind::kPut);
      case 'U':
      case '\x8a':
        return counted(at, 1);
      case 'X':
        return counted(at, 4);
      case 'c':
        return global(at);
      default:
        return std::nullopt;
    }
  }

 private:
  std::optional<Opcode> fixed(size_t at, size_t argument_nbytes, Opcode::Kind kind) const {
    if (nbytes_ - at - 1 < argument_nbytes) return std::nullopt;
    Opcode opcode{kind, at + 1 + argument_nbytes, 0};
    if (kind == Opcode::Kind::kPut || kind == Opcode::Kind::kGet) opcode.index = number(at + 1, argument_nbytes);
    return opcode;
  }

  std::optional<Opcode> counted(size_t at, size_t length_nbytes) const {
    if (nbytes_ - at - 1 < length_nbytes) return std::nullopt;
    const size_t begin = at + 1 + length_nbytes;
    const size_t length = number(at + 1, length_nbytes);
    if (nbytes_ - begin < length) return std::nullopt;
    return Opcode{Opcode::Kind::kOther, begin + length, 0};
  }

  std::optional<Opcode> global(size_t at) const {
    size_t end = at + 1;
    for (int line = 0; line < 2; ++line) {
      const void* newline = std::memchr(bytes_ + end, '\n', nbytes_ - end);
      if (newline == nullptr) return std::nullopt;
      end = static_cast<size_t>(static_cast<const char*>(newline) - bytes_) + 1;
    }
    return Opcode{Opcode::Kind::kOther, end, 0};
  }

  uint32_t number(size_t at, size_t nbytes) const {
    uint32_t value = 0;
    for (size_t i = nbytes; i-- > 0;) value = value << 8 | static_cast<uint8_t>(bytes_[at + i]);
    return value;
  }

  const char* bytes_;
  size_t nbytes_;
};

}  // namespace

std::string without_unused_puts(const char* bytes, size_t nbytes) {
  const std::string unchanged(bytes, nbytes);
  const Stream stream(bytes, nbytes);
  // A memo has at most one entry a byte of its stream; an index beyond is not a pickler's.
  std::vector<bool> asked_for(nbytes, false);
  std::optional<Opcode> opcode;
  for (size_t at = 0;; at = opcode->end) {
    opcode = stream.opcode(at);
    if (!opcode || opcode->index >= nbytes) return unchanged;
    if (opcode->kind == Opcode::Kind::kGet) asked_for[opcode->index] = true;
    if (opcode->kind == Opcode::Kind::kStop) break;
  }
  const size_t end = opcode->end;
  std::string lean;
  lean.reserve(end);
  for (size_t at = 0; at < end; at = opcode->end) {
    opcode = stream.opcode(at);
    if (opcode->kind == Opcode::Kind::kPut && !asked_for[opcode->index]) continue;
    lean.append(bytes + at, opcode->end - at);
  }
  return lean;
}

}  // namespace sdio
