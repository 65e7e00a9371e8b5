#!/usr/bin/env bash
# Fuzzes the archive reader under AddressSanitizer and UndefinedBehaviorSanitizer:
#
#   scripts/fuzz.sh SECONDS                      on each processor with a seed of its own
#   scripts/fuzz.sh --runs N [--seed N]          on one; CI's are 200000, the long mode is --runs 1000000
#   scripts/fuzz.sh --only RUN [--seed N]        repeats one run that failed
#   scripts/fuzz.sh --libfuzzer SECONDS          guided by coverage, where clang has libFuzzer
set -euo pipefail
cd "$(dirname "$0")/.."

if (($# == 0)); then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
# Built where `sanitize.sh address` builds: most of it is there.
build_dir=build/sanitize-address
flags=(-DSDIO_BUILD_FUZZER=ON "-DSDIO_SANITIZE=address;undefined" -DCMAKE_BUILD_TYPE=Debug
    "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1")
if command -v ninja >/dev/null; then
    flags+=(-G Ninja "-DCMAKE_MAKE_PROGRAM=$(command -v ninja)")
fi
if [[ $1 == --libfuzzer ]]; then
    build_dir=build/libfuzzer
    flags+=(-DCMAKE_CXX_COMPILER=clang++ -DSDIO_LIBFUZZER=ON)
fi
cmake -S . -B "$build_dir" "${flags[@]}" >/dev/null
cmake --build "$build_dir" --target archive_fuzz

export UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
case $1 in
--libfuzzer)
    # The target counts allocations in an operator new of its own; libFuzzer frees one of ASan's with it.
    export ASAN_OPTIONS=${ASAN_OPTIONS:-alloc_dealloc_mismatch=0}
    corpus=$build_dir/corpus
    mkdir -p "$corpus"
    exec "$build_dir/archive_fuzz" -max_total_time="$2" -timeout=30 -max_len=1048576 -artifact_prefix="$build_dir/" "$corpus" tests/fuzz/seeds
    ;;
--*) exec "$build_dir/archive_fuzz" "$@" tests/fuzz/seeds ;;
*)
    processes=()
    for ((seed = 1; seed <= $(getconf _NPROCESSORS_ONLN); seed++)); do
        "$build_dir/archive_fuzz" --seconds "$1" --seed "$seed" tests/fuzz/seeds &
        processes+=($!)
    done
    status=0
    for process in "${processes[@]}"; do
        wait "$process" || status=$?
    done
    exit $status
    ;;
esac
