// Fuzzes the archive reader with mutated archives.
//
//   archive_fuzz [--runs N | --seconds S] [--seed N] [--only RUN] SEEDS...
//
// SEEDS are archives, and directories of them. Run number R of seed N is the same on every machine; --only repeats one.
// Whatever breaks ends the process; the archive that did it is left in archive_fuzz_failure.zip. Built with
// -DSDIO_LIBFUZZER it is a libFuzzer target with the same mutations instead.

#include <dirent.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "archive_mutator.h"
#include "archive_target.h"

#ifdef SDIO_LIBFUZZER

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t nbytes) {
  sdio::read_whole_archive(std::string(reinterpret_cast<const char*>(data), nbytes));
  return 0;
}

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t nbytes, size_t max_nbytes);

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t nbytes, size_t max_nbytes, unsigned seed) {
  if (seed % 8 == 0) return LLVMFuzzerMutate(data, nbytes, max_nbytes);
  std::mt19937_64 random(seed);
  const std::string archive(reinterpret_cast<const char*>(data), nbytes);
  const std::string mutated = sdio::ArchiveMutator({archive}).mutate(archive, random, max_nbytes);
  std::memcpy(data, mutated.data(), mutated.size());
  return mutated.size();
}

#else

namespace {

constexpr size_t kMaxArchiveNbytes = 1u << 20;
constexpr unsigned kHangSeconds = 30;  // a run takes microseconds

struct Options {
  uint64_t runs = 20000;
  uint64_t seconds = 0;  // 0: as many runs
  uint64_t seed = 1;
  bool only_one = false;
  uint64_t only = 0;
  std::vector<std::string> seeds;
};

// Where the fuzzer is, for whoever ends the process.
uint64_t current_seed, current_run;
const std::string* current_archive = nullptr;

void report() {
  if (current_archive == nullptr) return;
  std::fprintf(stderr, "archive_fuzz: run %llu of --seed %llu (--only %llu repeats it), see archive_fuzz_failure.zip\n",
               static_cast<unsigned long long>(current_run), static_cast<unsigned long long>(current_seed),
               static_cast<unsigned long long>(current_run));
  if (FILE* file = std::fopen("archive_fuzz_failure.zip", "wb")) {
    std::fwrite(current_archive->data(), 1, current_archive->size(), file);
    std::fclose(file);
  }
  current_archive = nullptr;
}

void end_by_signal(int number) {
  if (number == SIGALRM) std::fprintf(stderr, "archive_fuzz: a run hangs\n");
  report();
  std::_Exit(1);
}

extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

void add_seeds(const std::string& path, std::vector<std::string>& seeds) {
  if (DIR* directory = opendir(path.c_str())) {
    std::vector<std::string> names;
    while (const dirent* entry = readdir(directory)) {
      if (entry->d_name[0] != '.') names.push_back(path + "/" + entry->d_name);
    }
    closedir(directory);
    std::sort(names.begin(), names.end());
    for (const std::string& name : names) add_seeds(name, seeds);
    return;
  }
  std::ifstream file(path, std::ios::binary);
  seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  if (!file || seeds.back().empty()) {
    std::fprintf(stderr, "archive_fuzz: cannot read %s\n", path.c_str());
    std::exit(2);
  }
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name.rfind("--", 0) != 0) {
      add_seeds(name, options.seeds);
      continue;
    }
    const uint64_t value = i + 1 < argc ? std::strtoull(argv[++i], nullptr, 10) : 0;
    if (name == "--runs") {
      options.runs = value;
    } else if (name == "--seconds") {
      options.seconds = value;
    } else if (name == "--seed") {
      options.seed = value;
    } else if (name == "--only") {
      options.only_one = true;
      options.only = value;
    } else {
      std::fprintf(stderr, "archive_fuzz: unknown option %s\n", name.c_str());
      std::exit(2);
    }
  }
  if (options.seeds.empty()) {
    std::fprintf(stderr, "usage: archive_fuzz [--runs N | --seconds S] [--seed N] [--only RUN] SEEDS...\n");
    std::exit(2);
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  if (&__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(report);
  for (const int number : {SIGALRM, SIGABRT, SIGSEGV, SIGBUS, SIGFPE}) {
    if (number == SIGALRM || number == SIGABRT || &__sanitizer_set_death_callback == nullptr)
      signal(number, end_by_signal);
  }
  current_seed = options.seed;
  for (const std::string& seed : options.seeds) {  // sound ones: what is refused here fuzzes nothing
    if (sdio::read_whole_archive(seed) == 0) {
      std::fprintf(stderr, "archive_fuzz: a seed was refused\n");
      return 2;
    }
  }
  const sdio::ArchiveMutator mutator(options.seeds);
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  uint64_t num_accepted = 0;
  uint64_t run = options.only_one ? options.only : 0;
  for (;; ++run) {
    if (options.seconds != 0 ? elapsed() >= static_cast<double>(options.seconds) : run >= options.runs) {
      if (!options.only_one) break;
    }
    std::mt19937_64 random(options.seed * 0x9e3779b97f4a7c15ull + run);
    const std::string& seed = options.seeds[random() % options.seeds.size()];
    const std::string archive = mutator.mutate(seed, random, kMaxArchiveNbytes);
    current_run = run;
    current_archive = &archive;
    alarm(kHangSeconds);
    num_accepted += sdio::read_whole_archive(archive) != 0 ? 1 : 0;
    alarm(0);
    current_archive = nullptr;
    if (options.only_one) break;
  }
  std::printf(
      "archive_fuzz: %llu runs from %zu seeds in %.1f s, seed %llu: %llu archives were read, the others refused\n",
      static_cast<unsigned long long>(options.only_one ? 1 : run), options.seeds.size(), elapsed(),
      static_cast<unsigned long long>(options.seed), static_cast<unsigned long long>(num_accepted));
  // Both ways have to be taken for the runs to mean anything.
  return options.only_one || (num_accepted != 0 && num_accepted != run) ? 0 : 2;
}

#endif
