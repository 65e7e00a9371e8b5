#include "pickle/memo.h"

#include <optional>
#include <vector>

#include "pickle/opcodes.h"

namespace sdio {
std::string without_unused_puts(const char* bytes, size_t nbytes) {
  const auto unchanged = [&] { return std::string(bytes, nbytes); };
  using pickle::Opcode;
  const pickle::Stream stream(bytes, nbytes);
  // A memo has at most one entry a byte of its stream; an index beyond is not a pickler's.
  std::vector<bool> asked_for(nbytes, false);
  std::optional<Opcode> opcode;
  bool stack_is_empty = true;  // above the last mark, for certain
  for (size_t at = 0;; at = opcode->end) {
    opcode = stream.opcode(at);
    if (!opcode || opcode->index >= nbytes) return unchanged();
    if (opcode->kind == Opcode::Kind::kPut && stack_is_empty) return unchanged();  // an error, which has to remain one
    if (stream.code(at) != '\x80') stack_is_empty = stream.code(at) == '(';
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
