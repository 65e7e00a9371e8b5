#!/usr/bin/env bash
# Builds the C++ tests that do without torch for AArch64 and runs them under qemu-user:
#
#   scripts/aarch64.sh [BUILD_DIR [CMAKE_ARGUMENT...]]       (build/aarch64)
#
# GoogleTest is built for it too, from the sources that come with libgtest-dev. What emulation cannot do is left out, by
# name, below; GTEST_FILTER replaces that. PAGE_NBYTES=65536 emulates pages of 64 KiB.
set -euo pipefail
cd "$(dirname "$0")/.."

build_dir=$(realpath -m "${1:-build/aarch64}")
shift $(($# > 0))
cross=aarch64-linux-gnu
sysroot=/usr/$cross
googletest=/usr/src/googletest

missing=()
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
command -v $cross-g++ >/dev/null || missing+=(g++-$cross)
[[ -d $googletest ]] || missing+=(googletest)
command -v ninja >/dev/null || missing+=(ninja-build)
if ((${#missing[@]})); then
    echo "to test for AArch64: apt-get install ${missing[*]}" >&2
    exit 1
fi

target=(
    -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 "-DCMAKE_CXX_COMPILER=$cross-g++"
    "-DCMAKE_C_COMPILER=$cross-gcc" -DCMAKE_BUILD_TYPE=Release
)
if [[ ! -d $build_dir/installed ]]; then
    cmake -S $googletest -B "$build_dir/googletest" "${target[@]}" -DBUILD_GMOCK=OFF \
        "-DCMAKE_INSTALL_PREFIX=$build_dir/installed" >/dev/null
    cmake --build "$build_dir/googletest" --target install >/dev/null
fi
emulator="qemu-aarch64;-L;$sysroot"
if [[ -n "${PAGE_NBYTES:-}" ]]; then
    emulator+=";-p;$PAGE_NBYTES"
fi
cmake -S . -B "$build_dir" "${target[@]}" -DTORCH_DIR= -DSDIO_BUILD_TESTS=ON "-DGTest_ROOT=$build_dir/installed" \
    "-DCMAKE_CROSSCOMPILING_EMULATOR=$emulator" "$@"
cmake --build "$build_dir"
# A death test runs its program again, which only the emulator can. The emulator's own memory grows with what is run, and
# it does not pass on what madvise() is told of populating memory.
left_out=Crc32DeathTest.*:Saves.OfManyRecordsLeaveNothingInTheHeapsOfWorkers:ExtentMemory.FaultingInKeepsWhatIsThere
export GTEST_FILTER=${GTEST_FILTER:--$left_out}
status=0
ctest --test-dir "$build_dir" --output-on-failure --parallel "$(getconf _NPROCESSORS_ONLN)" || status=$?
# How many tests that was, of how many programs.
awk '/^\[  PASSED  \]/ { passed += $4 } /^\[  FAILED  \] [0-9]+ test/ { failed += $4 } /^\[  SKIPPED \] [0-9]+ test/ { skipped += $4 }
     END { printf "AArch64: %d passed, %d failed, %d skipped\n", passed, failed, skipped }' \
    "$build_dir/Testing/Temporary/LastTest.log"
exit $status
