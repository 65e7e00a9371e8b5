"""Every system call of a save that touches a file, failing once and for good, with every error that it can give."""

import collections
import json
import re
import shutil
import subprocess

import pytest
from conftest import require_native

from faults.preload import run_module
from faults.ways import OPTIONS, SAFETENSORS


def require(way):
    if way.startswith("native") or SAFETENSORS.get(way) == "native":
        require_native()


@pytest.fixture(params=["native", "torch", "legacy"])
def way(request):
    require(request.param)
    return request.param


@pytest.mark.parametrize("way", [*OPTIONS, "native-async", "torch-async", *SAFETENSORS])
@pytest.mark.parametrize("size", ["quick", pytest.param("exhaustive", marks=pytest.mark.long)])
@pytest.mark.timeout(900)
def test_every_call_failing_in_every_way(size, way, preload, tmp_path, report_counts):
    require(way)
    printed = run_module(preload, "matrix_process", tmp_path, way, size, timeout=850)
    *failures, summary = printed.splitlines()
    counts = json.loads(summary)
    report_counts(
        f"{way}: {counts['calls']} calls x {counts['errors']} errors, "
        f"{counts['faults']} saves disturbed, {counts['failures']} failures"
    )
    assert failures == [], "\n".join(failures[:40])
    assert counts["faults"] > 1000


def test_odd_alignments_of_direct_io(preload, tmp_path):
    """Met, or not used: never a wrong byte."""
    require("native")
    asked = {
        int(alignment): was for alignment, was in json.loads(run_module(preload, "alignment_process", tmp_path)).items()
    }
    # Not used: 0, what is no power of two, and more than is written at once.
    assert {alignment for alignment, was in asked.items() if was} == {1, 512, 4096, 8192, 65536, 1 << 20}


FAMILIES = {
    "open": "open", "openat": "open", "pread": "pread64", "pwrite": "pwritev", "posix_fallocate": "fallocate",
    "stat": "stat", "lstat": "stat", "fstat": "stat", "fstatat": "stat", "newfstatat": "stat", "faccessat": "access",
    "faccessat2": "access", "write": "writev", "readlinkat": "readlink", "rename": "renameat", "renameat2": "renameat",
    "unlink": "unlinkat", "rmdir": "unlinkat", "mkdir": "mkdirat", "closedir": "close",
}  # fmt: skip
NO_CALLS = {"fdopendir", "readdir", "pthread_create"}  # library functions; readdir is getdents64
MEMORY = re.compile(r"mmap\(.* -1, 0\)|munmap\(|mprotect\(|mremap\(|brk\(")


def whole_calls(trace):
    """Each call in one line: strace splits one during which another thread calls."""
    begun = {}
    for line in trace.splitlines():
        thread = line.split(maxsplit=1)[0]
        if line.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>").rstrip()
        elif resumed := re.match(r"\d+\s+<\.\.\. \w+ resumed>(.*)", line):
            yield begun.pop(thread) + resumed[1]
        else:
            yield line


def traced_calls(trace):
    """The calls between the marks, by family, less those that glibc makes for itself to count the processors."""
    found, inside, counting = collections.Counter(), False, set()  # (thread, descriptor)
    for line in whole_calls(trace):
        call = re.match(r"\d+\s+(\w+)\(", line)
        if "/sdio-" in line:
            inside = "/sdio-begin" in line
        elif inside and call and not MEMORY.search(line):
            name = FAMILIES.get(call[1], call[1])
            opened = re.search(r'openat\(AT_FDCWD, "/(?:sys/devices/system/cpu|proc/stat).* = (\d+)$', line)
            thread = line.split(maxsplit=1)[0]
            of_descriptor = re.match(r"\d+\s+\w+\((\d+)[,)]", line)
            described = (thread, of_descriptor[1]) if of_descriptor else None
            if opened:
                counting.add((thread, opened[1]))
            elif described not in counting:
                found[name] += 1
            elif name == "close":
                counting.remove(described)
    return found


def test_injection_misses_no_call(way, preload, tmp_path):
    """What strace sees is what the preloaded library sees: nothing touches a file behind its back."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "--seccomp-bpf", "-o", str(trace)]
    strace += ["-e", "trace=%file,%desc,sync,fsync,fdatasync,syncfs,sync_file_range"]
    if subprocess.run([*strace, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("strace may not trace here")
    (tmp_path / "in").mkdir()
    seen_by_library = json.loads(run_module(preload, "traced_process", tmp_path / "in", way, wrapper=strace))
    expected = collections.Counter()
    for call, count in seen_by_library.items():
        if call not in NO_CALLS:
            expected[FAMILIES.get(call, call)] += count
    listings = seen_by_library["fdopendir"]  # each looks at its descriptor, and rewinds it
    expected.update({"stat": listings, "fcntl": 2 * listings})
    found = traced_calls(trace.read_text())
    assert found.pop("getdents64") >= listings
    rewinds = found.pop("lseek", 0) - expected.pop("lseek", 0)
    assert 0 <= rewinds <= listings + seen_by_library.get("write", 0)  # the library asks where a write goes
    assert found == expected
