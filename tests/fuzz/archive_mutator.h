// Changes archives the way an attacker would: fields of the zip structures first, then bytes at large.
//
// Deterministic: the same bytes and the same random numbers give the same archive.
#pragma once

#include <cstddef>
#include <random>
#include <string>
#include <vector>

namespace sdio {

class ArchiveMutator {
 public:
  // `others`: archives to splice pieces from.
  explicit ArchiveMutator(std::vector<std::string> others) : others_(std::move(others)) {}

  // One to four changes; the result has at most `max_nbytes` bytes.
  std::string mutate(std::string archive, std::mt19937_64& random, size_t max_nbytes) const;

 private:
  void change(std::string& archive, std::mt19937_64& random) const;

  std::vector<std::string> others_;
};

}  // namespace sdio
