"""Saves and loads where memory is limited: of the address space (RLIMIT_AS), and by control groups."""

import contextlib
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import warm_process

import statedict_io as sio

MIB = 1 << 20
CGROUP_V1 = pathlib.Path("/sys/fs/cgroup/memory")
PROCESS = pathlib.Path(__file__).parent / "memory_process.py"


def run(*arguments, group=None):
    """(exit status, output) of memory_process.py."""

    def enter():
        (group / "cgroup.procs").write_text(str(os.getpid()))

    if group is None:
        done = warm_process.run(PROCESS, *arguments, timeout=600)
    else:
        command = [sys.executable, PROCESS, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, preexec_fn=enter)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "action", ["save", "save buffered", "save to an object", "save_async", "load", "load verified", "verify"]
)
def test_250_mib_of_address_space(action, backend, tmp_path):
    """A durable native save wanted 700 MiB: nine threads, each with a heap of its own, and twelve slots."""
    status, output = run("address space", 250 * MIB, action, tmp_path / "model.pt", backend)
    assert (status, output.strip()) == (0, "as expected"), output


@pytest.mark.parametrize("spare", [40 * MIB, 90 * MIB, 160 * MIB])
def test_less_than_that_is_enough_where_the_choice_is_free(spare, tmp_path):
    """torch.save may do it; a proof that failed for want of memory is made again when there is some."""
    status, output = run("proofs", spare, "save", tmp_path / "model.pt", "auto")
    said, *warned = output.splitlines()
    assert (status, said) == (0, "as expected"), output
    # Whether the proof had memory enough is a matter of luck, and a save without it says that it is slower.
    assert not warned or "SlowerWarning: statedict_io is slower than it could be: the proof 'format'" in warned[0]


@pytest.fixture
def nested_group():
    """A group of 600 MiB, and one without a limit below it, of version 1."""
    outer = CGROUP_V1 / pathlib.Path("/proc/self/cgroup").read_text().split(":memory:")[-1].split("\n")[0].strip("/")
    outer = outer / f"statedict_io_test_{os.getpid()}"
    try:
        (outer / "inner").mkdir(parents=True)
        (outer / "memory.limit_in_bytes").write_text(str(600 * MIB))
    except OSError as e:
        with contextlib.suppress(OSError):
            (outer / "inner").rmdir()
        pytest.skip(f"no control groups to be made here: {e}")
    yield outer / "inner"
    (outer / "inner").rmdir()
    outer.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make control groups")
def test_save_async_in_a_nested_control_group(nested_group, backend, tmp_path):
    """Half of the machine's memory is not what the group above leaves: the process was killed."""
    status, output = run("group", 260 * MIB, "save_async", tmp_path / "model.pt", backend, group=nested_group)
    assert (status, output.strip()) == (0, "as expected"), output
    saved = torch.load(tmp_path / "model.pt", mmap=True)
    assert saved["weight"].nbytes == 260 * MIB
    assert sio.verify(tmp_path / "model.pt").ok
