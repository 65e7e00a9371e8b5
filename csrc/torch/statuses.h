// What LibTorch throws, as the statuses that cross to the other module.
#pragma once

#include <c10/util/Exception.h>

#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>

#include "boundary/torch_functions.h"

namespace sdio {

// A device that lacks streams, events or kernels: others copy from it in torch's own way.
class Unsupported final : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Runs `function`; what LibTorch refuses for another reason than memory is thrown as Unsupported.
template <typename Function>
auto supported(const Function& function) {
  try {
    return function();
  } catch (const c10::OutOfMemoryError&) {
    throw;
  } catch (const c10::Error& e) {
    throw Unsupported(e.what_without_backtrace());
  }
}

// Cut at the end of a character.
inline void describe(sdio_error* error, const char* message) noexcept {
  constexpr size_t kMaxLength = sizeof(error->message) - 1;
  size_t length = std::strlen(message);
  if (length > kMaxLength) {
    length = kMaxLength;
    while (length > 0 && (static_cast<unsigned char>(message[length]) & 0xC0) == 0x80) --length;
  }
  std::memcpy(error->message, message, length);
  error->message[length] = '\0';
}

template <typename Function>
sdio_status status_of(sdio_error* error, const Function& function) noexcept {
  try {
    function();
    return SDIO_OK;
  } catch (const c10::OutOfMemoryError& e) {
    describe(error, e.what_without_backtrace());
    return SDIO_NO_MEMORY;
  } catch (const std::bad_alloc&) {
    describe(error, "out of memory");
    return SDIO_NO_MEMORY;
  } catch (const Unsupported& e) {
    describe(error, e.what());
    return SDIO_UNSUPPORTED;
  } catch (const c10::Error& e) {
    describe(error, e.what_without_backtrace());
  } catch (const std::exception& e) {
    describe(error, e.what());
  } catch (...) {
    describe(error, "unknown error");
  }
  return SDIO_FAILED;
}

// What `make` returns, a std::unique_ptr; null where it throws.
template <typename Make>
auto made(sdio_status* status, sdio_error* error, const Make& make) noexcept -> decltype(make().release()) {
  decltype(make().release()) result = nullptr;
  *status = status_of(error, [&] { result = make().release(); });
  return result;
}

}  // namespace sdio
