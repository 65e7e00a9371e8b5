// What a fuzzer calls: everything that the reader does with an archive, and whether it kept its promises.
#pragma once

#include <cstddef>
#include <string>

namespace sdio {

// Opens the archive, reads and checksums its records. It may be refused; what is read must be what is in the file, and
// memory stays below the archive's size + 64 MiB. Aborts with a message where a promise is broken. Returns how many
// records were read, 0 where the archive was refused.
size_t read_whole_archive(const std::string& archive);

}  // namespace sdio
