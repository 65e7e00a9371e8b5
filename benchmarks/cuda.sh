#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: build, the CUDA tests, benchmarks and a timeline of a save, on tmpfs
# and on a disk.
#
#   benchmarks/cuda.sh            results go to $OUT (default ./bench-out): one log, four JSON files, two traces
#
# Needs no network: torch, cmake, ninja, setuptools and pytest must be installed. Each stage has its own time limit, and
# a stage that fails doesn't stop the next; the exit status is the number of failed stages, 100 without a CUDA device.
# Builds the extension in place, replacing the one in this tree.
#
# OUT        where results go
# PYTHON     the Python that has torch (default python3)
# SIZE       payload of the benchmarks (default 1GiB)
# DISK_DIR   a directory on the disk to measure (default: the repository)
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
SIZE=${SIZE:-1GiB}
DISK_DIR=${DISK_DIR:-$PWD}
export OUT=${OUT:-$PWD/bench-out}
export PYTHONUNBUFFERED=1
export PIP_DISABLE_PIP_VERSION_CHECK=1

# Before anything is built: the build replaces the extension in this tree, which is wanted on a GPU machine only.
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "cuda.sh: $PYTHON has no torch that sees a CUDA device; nothing was done" >&2
  exit 100
fi
mkdir -p "$OUT"
: >"$OUT/cuda.log"

failed=0

stage() { # name, seconds, command...
  local name=$1 limit=$2 status
  shift 2
  echo "=== $name (at most $limit s)" | tee -a "$OUT/cuda.log"
  local start=$SECONDS
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$OUT/cuda.log"
  status=${PIPESTATUS[0]}
  echo "=== $name: exit $status after $((SECONDS - start)) s" | tee -a "$OUT/cuda.log"
  [ "$status" -eq 0 ] || failed=$((failed + 1))
}

machine() {
  nvidia-smi
  df -hT / /tmp /dev/shm "$DISK_DIR"
  lscpu | grep -E 'Model name|^CPU\(s\)|Socket|NUMA node' || true
  "$PYTHON" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())'
}

build() {
  STATEDICT_IO_BUILD=native "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --editable . || return 1
  "$PYTHON" -c 'import statedict_io as sio, sys; i = sio.backend_info(); print(i); sys.exit(i.name != "native")'
}

device_tests() {
  STATEDICT_IO_REQUIRE_CUDA=1 "$PYTHON" -m pytest -m cuda -ra
}

bench() { # where, seconds to spend, results file
  "$PYTHON" -m benchmarks.run --device cuda --case llama --size "$SIZE" --rounds 5 --seconds "$2" --dir "$1" \
    --timeout 60 --contenders "$contenders" --out "$3"
}

timeline() { # where, results file without .json
  "$PYTHON" -m benchmarks.timeline --device cuda --case llama --size "$SIZE" --rounds 3 --dir "$1" \
    --out "$2.json" --trace "$2-trace.json.gz"
}

# Fewest first: what the figures are for. Peers whose package is missing are reported as skipped.
contenders=torch,torch_nocrc,torch_pinned,torch_pinned_nocrc,torch_atomic,safetensors,deepspeed
contenders=$contenders,native,native_nodurable,raw_buffered,raw_direct,raw_pinned
export -f machine build device_tests bench timeline
export PYTHON SIZE DISK_DIR contenders

stage machine 25 bash -c machine
stage build 120 bash -c build
stage tests 100 bash -c device_tests
stage bench-tmpfs 105 bash -c "bench /dev/shm 60 '$OUT/cuda-tmpfs.json'"
stage bench-disk 125 bash -c "bench '$DISK_DIR' 80 '$OUT/cuda-disk.json'"
stage timeline-tmpfs 30 bash -c "timeline /dev/shm '$OUT/cuda-timeline-tmpfs'"
stage timeline-disk 30 bash -c "timeline '$DISK_DIR' '$OUT/cuda-timeline-disk'"

echo "=== $failed stages failed; results in $OUT"
exit "$failed"
