// The size of the pages that the system may map large memory with, and that such memory is aligned to.
#pragma once

#include <cstddef>

namespace sdio {

inline constexpr size_t kHugePageNbytes = 2u << 20;

}  // namespace sdio
