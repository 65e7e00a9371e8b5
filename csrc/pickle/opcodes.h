// The opcodes of pickle streams that torch's restricted unpickler knows, with their arguments.
//
// Pure; a Stream refers to the caller's bytes. Depends on nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace sdio::pickle {

struct Opcode {
  enum class Kind { kOther, kPut, kGet, kStop } kind = Kind::kOther;
  size_t end = 0;      // of its argument
  uint32_t index = 0;  // in the memo, of kPut and kGet
};

class Stream {
 public:
  Stream(const char* bytes, size_t nbytes) : bytes_(bytes), nbytes_(nbytes) {}

  // The opcode at `at`, or nothing where it is unknown or cut off.
  std::optional<Opcode> opcode(size_t at) const;

  char code(size_t at) const { return bytes_[at]; }
  const char* bytes() const { return bytes_; }

  // An unsigned little-endian number.
  uint32_t number(size_t at, size_t nbytes) const;

 private:
  std::optional<Opcode> fixed(size_t at, size_t argument_nbytes, Opcode::Kind kind) const;
  std::optional<Opcode> counted(size_t at, size_t length_nbytes) const;
  std::optional<Opcode> global(size_t at) const;

  const char* bytes_;
  size_t nbytes_;
};

}  // namespace sdio::pickle
