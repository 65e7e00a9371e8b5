#include "file/system_error.h"

#include <cstring>

namespace sdio {

SystemError::SystemError(int error_number, const std::string& operation)
    : std::runtime_error(operation + ": " + std::strerror(error_number)), error_number_(error_number) {}

}  // namespace sdio
