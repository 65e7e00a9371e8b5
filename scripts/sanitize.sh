#!/usr/bin/env bash
# Runs tests under a checker:
#
#   scripts/sanitize.sh address           C++ tests: AddressSanitizer, LeakSanitizer, UndefinedBehaviorSanitizer
#   scripts/sanitize.sh thread            C++ tests: ThreadSanitizer
#   scripts/sanitize.sh valgrind          C++ tests, as `make test-cpp` builds them: Valgrind's memcheck
#   scripts/sanitize.sh python-address    Python tests, with an extension built as for `address`
#
# TORCH_DIR is understood as by cpp_tests.sh; python-address needs it. See docs/tested.md.
set -euo pipefail
cd "$(dirname "$0")/.."

mode=${1:-}
build_dir=build/sanitize-$mode
flags=(-DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1")

case $mode in
address)
    export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_stack_use_after_return=1:strict_init_order=1}
    export UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
    scripts/cpp_tests.sh "$build_dir" "${flags[@]}" "-DSDIO_SANITIZE=address;undefined"
    ;;
thread)
    export TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1:second_deadlock_stack=1}
    # Nothing of these layers runs in more than one thread or holds anything that two share.
    scripts/cpp_tests.sh "$build_dir" "${flags[@]}" -DSDIO_SANITIZE=thread "-DSDIO_UNTESTED_LAYERS=pickle;archive"
    ;;
valgrind)
    if ! command -v valgrind >/dev/null; then
        echo "valgrind is not installed (on Debian and Ubuntu: apt-get install valgrind)" >&2
        exit 1
    fi
    build_dir=build/tests
    BUILD_ONLY=1 scripts/cpp_tests.sh "$build_dir"
    memcheck=(valgrind --quiet --error-exitcode=9 --leak-check=full --suppressions=scripts/valgrind.supp)
    # Possibly lost is what detached threads hold when the process ends.
    memcheck+=(--show-leak-kinds=definite --errors-for-leak-kinds=definite)
    planted=("$build_dir/pipeline_padding_test" --gtest_also_run_disabled_tests '--gtest_filter=*DISABLED_Planted*')
    status=0
    "${memcheck[@]}" "${planted[@]}" &>"$build_dir/planted.log" || status=$?
    if ((status != 9)) || ! grep -q 'pwritev.* uninitialised' "$build_dir/planted.log"; then
        echo "memcheck did not report undefined bytes that were written on purpose: see $build_dir/planted.log" >&2
        exit 1
    fi
    # Those of the upper layers take longest: they go first.
    printf '%s\n' "$build_dir"/*_test | sort --reverse |
        xargs -P "$(getconf _NPROCESSORS_ONLN)" -I '{}' "${memcheck[@]}" '{}' --gtest_brief=1
    ;;
python-address)
    # Built where the C++ tests were: most of it is there.
    scripts/sanitize_python.sh "$build_dir" build/sanitize-address "${flags[@]}" "-DSDIO_SANITIZE=address;undefined"
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
