// The calls that rebuild plain tensors, taken out of a pickle stream.
//
// Pure: bytes in, bytes and numbers out; any thread. Depends on nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace sdio {

// torch._utils._rebuild_tensor_v2(<storage>, offset, size, stride, requires_grad, collections.OrderedDict())
struct TensorCall {
  std::string storage_type;  // "torch FloatStorage": module and name
  std::string key;
  std::string location;
  uint64_t numel;  // of the storage
  uint64_t offset;
  std::vector<uint64_t> size;
  std::vector<uint64_t> stride;
  bool requires_grad;
};

struct AbridgedPickle {
  std::string stream;
  std::vector<TensorCall> calls;
};

// The stream with such calls replaced by the number of the call as a persistent id: 2 steps for some 25. Only what
// torch.save writes for a plain tensor is taken for one, to the letter, and only where each global and string in it was
// already spelled out before: the unpickler has seen and allowed all of them by then. `stream`: as without_unused_puts
// returns it. What is not understood stays as it is; so does a stream in which any other persistent id might be a
// number.
AbridgedPickle without_tensor_calls(std::string stream);

}  // namespace sdio
