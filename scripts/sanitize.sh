#!/usr/bin/env bash
# Runs the C++ tests under a checker, in a build directory of its own:
#
#   scripts/sanitize.sh address     AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer
#   scripts/sanitize.sh thread      ThreadSanitizer
#   scripts/sanitize.sh valgrind    Valgrind's memcheck
#
# TORCH_DIR is understood as by cpp_tests.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

mode=${1:-}
build_dir=build/sanitize-$mode
flags=(-DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g")

case $mode in
address)
    export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_stack_use_after_return=1:strict_init_order=1}
    export UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
    scripts/cpp_tests.sh "$build_dir" "${flags[@]}" "-DSDIO_SANITIZE=address;undefined"
    ;;
thread)
    export TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1:second_deadlock_stack=1}
    scripts/cpp_tests.sh "$build_dir" "${flags[@]}" -DSDIO_SANITIZE=thread
    ;;
valgrind)
    if ! command -v valgrind >/dev/null; then
        echo "valgrind is not installed" >&2
        exit 1
    fi
    scripts/cpp_tests.sh "$build_dir" "${flags[@]}"
    for test in "$build_dir"/*_test; do
        valgrind --quiet --error-exitcode=1 --leak-check=full "$test" --gtest_brief=1
    done
    ;;
*)
    echo "usage: scripts/sanitize.sh address | thread | valgrind" >&2
    exit 2
    ;;
esac
