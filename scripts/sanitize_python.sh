#!/usr/bin/env bash
# Runs Python tests against an extension built with AddressSanitizer and UndefinedBehaviorSanitizer:
#
#   scripts/sanitize_python.sh RUN_DIR BUILD_DIR [CMAKE_ARGUMENT...]
#
# The tests run in RUN_DIR/tree, a copy of the package and its tests that holds that extension: the installed one, and
# the one beside the sources, stay as they are. PYTEST_ARGS replaces the choice of tests. Called by sanitize.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

run_dir=$1
build_dir=$2
shift 2
scripts=$PWD/scripts
tree=$PWD/$run_dir/tree
reports=$PWD/$run_dir/reports
: "${TORCH_DIR:?set it to the directory of the installed torch package}"
python=$(command -v python || command -v python3)

# Python is not linked with the runtimes, and they must come first. The C++ library too: they look for __cxa_throw when
# the process starts.
runtimes=()
for library in libasan.so libubsan.so libstdc++.so.6; do
    path=$("${CXX:-c++}" -print-file-name="$library")
    if [[ $path != /* ]]; then
        echo "$library was not found: this needs GCC and its sanitizers" >&2
        exit 1
    fi
    runtimes+=("$(realpath "$path")")
done

generator=()
if command -v ninja >/dev/null; then
    generator=(-G Ninja "-DCMAKE_MAKE_PROGRAM=$(command -v ninja)")
fi
cmake -S . -B "$build_dir" "${generator[@]}" "-DTORCH_DIR=$TORCH_DIR" "-DPython_EXECUTABLE=$python" \
    -DSDIO_BUILD_EXTENSION=ON "$@" >/dev/null
release=$("$python" -c 'import torch; print("{}_{}".format(*torch.__version__.split(".")[:2]))')
cmake --build "$build_dir" --target _core "_torch_$release"

rm -rf "$tree/statedict_io" "$tree/tests" "$tree/build" "$reports"
mkdir -p "$tree/build" "$reports" build/device_standin
ln -sfn "$PWD/build/device_standin" "$tree/build/device_standin"
cp -r statedict_io tests pyproject.toml docs csrc "$tree"
rm -f "$tree"/statedict_io/_core*.so "$tree"/statedict_io/_torch_*.so
cp "$build_dir"/_core*.so "$build_dir"/_torch_*.so "$tree/statedict_io"

cd "$tree"
export PYTHONPATH=$tree:$tree/tests STATEDICT_IO_REQUIRE_NATIVE=1
unset PYTHONSAFEPATH
# The compiler is no business of the sanitizers'.
"$python" -c 'import device_standin; device_standin.build()'

# A leak is no reason to fail by itself: Python and torch never give everything back. sanitizer_reports.py reads the
# reports, of all processes that the tests start, and picks out those in which our code took the memory.
export ASAN_OPTIONS=abort_on_error=1:detect_leaks=1:detect_odr_violation=0:log_path=$reports/report
export LSAN_OPTIONS=exitcode=0:max_leaks=0:print_suppressions=0
export UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1
export PYTHONMALLOC=malloc  # each object a block of its own
sanitized=(env "LD_PRELOAD=$(IFS=:; echo "${runtimes[*]}")" "$python")
# What UndefinedBehaviorSanitizer says before it ends the process goes past the capture.
pytest=("${sanitized[@]}" -m pytest -p no:cacheprovider --capture=sys)

# The leak detector itself crashes now and then, at the end of a process, with a report of that or after one of leaks: of
# pytest, or of one whose status a test looks at.
reports_of_its_crashes() { grep -ls '^Tracer caught signal' "$reports"/report.*; }
reports_of_errors() { grep -lsE 'ERROR: AddressSanitizer|runtime error:' "$reports"/report.*; }

# run NAME ARGUMENT...: pytest, whose output is shown if it fails. Where it failed and no error was reported, once more;
# what the sanitizers reported of other processes still counts.
run() {
    local name=$1 status=0
    shift
    rm -f $(reports_of_its_crashes)
    "${pytest[@]}" -q --tb=short "$@" &>"$reports.$name.log" || status=$?
    if ((status != 0)) && [[ -z $(reports_of_errors) ]]; then
        echo "$name: failed without a report of an error; once more, after:"
        tail -n 3 "$reports.$name.log"
        status=0
        "${pytest[@]}" -q --tb=short "$@" &>"$reports.$name.log" || status=$?
    fi
    if ((status != 0)); then
        cat "$reports.$name.log"
    fi
    echo "$name: $(tail -n 1 "$reports.$name.log")"
    return $status
}

# Without the leak detector, which this does not try: once, on a busy machine, the process aborted after its report.
if ! ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0 "${sanitized[@]}" "$scripts/sanitizer_canary.py" "$tree" "$reports"; then
    find "$reports" -type f -exec cat '{}' +
    exit 1
fi

status=0
if [[ -n "${PYTEST_ARGS:-}" ]]; then
    # shellcheck disable=SC2086
    "${pytest[@]}" $PYTEST_ARGS || status=$?
else
    # Two at a time, of about the same length. What the Python backend does is no matter of the extension.
    (
        first=0
        run devices tests/device_standin/checks.py -k 'not [torch' || first=$?
        run targets tests/test_targets.py tests/test_streamed_paths.py tests/test_torch_settings.py \
            -k 'native and not storage_alignment' || first=$?
        exit $first
    ) &
    run bytes tests/test_byte_identity.py -k 'native and written_as_torch and not many' || status=$?
    run surroundings tests/faults/test_surroundings.py tests/faults/test_concurrency.py \
        tests/faults/test_interruptions.py -k native || status=$?
    # The leak detector does not survive threads that could not be started.
    ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0 run faults tests/faults/test_fault_injection.py \
        -k 'quick-native and not async' || status=$?
    wait $! || status=$?
fi
"$python" "$scripts/sanitizer_reports.py" "$reports" statedict_io/_ || status=$?
exit $status
