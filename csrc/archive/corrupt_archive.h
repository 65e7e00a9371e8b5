// The exception that says what is wrong with the bytes of an archive, and in which record. The caller adds the path.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace sdio {

class CorruptArchive : public std::runtime_error {
 public:
  explicit CorruptArchive(const std::string& problem) : std::runtime_error(problem) {}

  // `record`: its full name, of which the message holds no more than a line's worth.
  CorruptArchive(std::string_view record, const std::string& problem)
      : std::runtime_error("record '" + std::string(record.substr(0, 200)) + "': " + problem) {}
};

}  // namespace sdio
