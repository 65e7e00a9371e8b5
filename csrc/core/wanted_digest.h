// The SHA-256 of a file that is written, where the caller wants it: he gives a bytearray of 32 bytes, which is filled.
//
// Needs the GIL, but for get().
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <optional>

#include "pipeline/write/file_digest.h"

namespace sdio {

class WantedDigest {
 public:
  // `destination`: None where none is wanted.
  explicit WantedDigest(const pybind11::object& destination) : destination_(destination) {
    if (destination.is_none()) return;
    if (!PyByteArray_Check(destination.ptr()) || PyByteArray_GET_SIZE(destination.ptr()) != sizeof(Sha256::Sum)) {
      throw pybind11::type_error("sha256 must be a bytearray of 32 bytes");
    }
    digest_.emplace();
  }

  FileDigest* get() { return digest_ ? &*digest_ : nullptr; }

  // When all is written.
  void give() {
    if (!digest_) return;
    const Sha256::Sum sum = digest_->finish();
    if (PyByteArray_GET_SIZE(destination_.ptr()) != sizeof sum) throw pybind11::type_error("sha256 was resized");
    std::memcpy(PyByteArray_AS_STRING(destination_.ptr()), sum.data(), sum.size());
  }

 private:
  const pybind11::object& destination_;
  std::optional<FileDigest> digest_;
};

}  // namespace sdio
