#include "pickle/opcodes.h"

#include <cstring>

namespace sdio::pickle {

std::optional<Opcode> Stream::opcode(size_t at) const {
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

std::optional<Opcode> Stream::fixed(size_t at, size_t argument_nbytes, Opcode::Kind kind) const {
  if (nbytes_ - at - 1 < argument_nbytes) return std::nullopt;
  Opcode opcode{kind, at + 1 + argument_nbytes, 0};
  if (kind == Opcode::Kind::kPut || kind == Opcode::Kind::kGet) opcode.index = number(at + 1, argument_nbytes);
  return opcode;
}

std::optional<Opcode> Stream::counted(size_t at, size_t length_nbytes) const {
  if (nbytes_ - at - 1 < length_nbytes) return std::nullopt;
  const size_t begin = at + 1 + length_nbytes;
  const size_t length = number(at + 1, length_nbytes);
  if (nbytes_ - begin < length) return std::nullopt;
  return Opcode{Opcode::Kind::kOther, begin + length, 0};
}

std::optional<Opcode> Stream::global(size_t at) const {
  size_t end = at + 1;
  for (int line = 0; line < 2; ++line) {
    const void* newline = std::memchr(bytes_ + end, '\n', nbytes_ - end);
    if (newline == nullptr) return std::nullopt;
    end = static_cast<size_t>(static_cast<const char*>(newline) - bytes_) + 1;
  }
  return Opcode{Opcode::Kind::kOther, end, 0};
}

uint32_t Stream::number(size_t at, size_t nbytes) const {
  uint32_t value = 0;
  for (size_t i = nbytes; i-- > 0;) value = value << 8 | static_cast<uint8_t>(bytes_[at + i]);
  return value;
}

}  // namespace sdio::pickle
