// A failed system call, with what the caller needs to raise an OSError.
#pragma once

#include <stdexcept>
#include <string>

namespace sdio {

class SystemError : public std::runtime_error {
 public:
  // `operation`: the call, e.g. "pwritev".
  SystemError(int error_number, const std::string& operation);

  int error_number() const { return error_number_; }

 private:
  int error_number_;
};

}  // namespace sdio
