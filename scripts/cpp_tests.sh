#!/usr/bin/env bash
# Builds the C++ tests in BUILD_DIR and runs them:
#
#   scripts/cpp_tests.sh BUILD_DIR [CMAKE_ARGUMENT...]
#
# Optimised as what ships, with line numbers, unless the arguments say otherwise. The layers that need torch are tested
# too where TORCH_DIR is set to a torch package directory. Without GoogleTest it says that the tests are skipped and
# succeeds, unless CI=true. With BUILD_ONLY=1 it only builds them.
set -euo pipefail
cd "$(dirname "$0")/.."

build_dir=$1
shift

generator=()
if command -v ninja >/dev/null; then
    generator=(-G Ninja "-DCMAKE_MAKE_PROGRAM=$(command -v ninja)")
fi
torch=(-DTORCH_DIR=)
if [[ -n "${TORCH_DIR:-}" ]] && compgen -G 'tests/cpp/torch*_test.cpp' >/dev/null; then
    torch=("-DTORCH_DIR=$TORCH_DIR")
fi

cmake -S . -B "$build_dir" "${generator[@]}" "${torch[@]}" -DSDIO_BUILD_TESTS=ON \
    -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CXX_FLAGS_RELEASE=-O3 -DNDEBUG -g1" "$@"
if ! ctest --test-dir "$build_dir" --show-only | grep -q 'Total Tests: [1-9]'; then
    echo "C++ TESTS SKIPPED: GoogleTest was not found (on Debian and Ubuntu: apt-get install libgtest-dev)" >&2
    [[ "${CI:-}" != true ]]
    exit
fi
cmake --build "$build_dir"
if [[ "${BUILD_ONLY:-}" == 1 ]]; then
    exit
fi
ctest --test-dir "$build_dir" --output-on-failure --parallel "$(getconf _NPROCESSORS_ONLN)"
