"""The end of a process with asynchronous saves in flight: exit, errors that nobody asked for, signals, fork."""

import os
import pathlib
import re
import signal

import pytest
import torch
import warm_process

import statedict_io as sio
from faults.temporary_files import age_temporaries

PROCESS = pathlib.Path(__file__).with_name("async_process.py")


def run(scenario, path, backend):
    return warm_process.run(PROCESS, scenario, path, backend, timeout=60)


@pytest.mark.parametrize(
    ("scenario", "status"),
    [
        ("exit_normally", 0),
        ("exit_by_sys_exit", 7),
        ("exit_by_exception", 1),
        ("called_by_a_daemon", 0),
        ("at_exit", 0),
    ],
)
def test_exit_waits(tmp_path, backend, scenario, status):
    ended = run(scenario, tmp_path / "model.pt", backend)
    assert ended.returncode == status, ended.stderr
    assert "statedict_io" not in ended.stderr.replace(str(PROCESS.parents[2]), "")
    assert torch.load(tmp_path / "model.pt")["value"] == 1
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("scenario", ["in_a_process_of_multiprocessing", "fork", "fork_at_any_moment"])
def test_other_processes(tmp_path, backend, scenario):
    ended = run(scenario, tmp_path / "model.pt", backend)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


@pytest.mark.parametrize(
    "scenario",
    ["error_never_collected", "error_never_collected_at_exit", "error_never_collected_in_multiprocessing"],
)
def test_an_error_that_nobody_asked_for_is_printed_at_exit(tmp_path, backend, scenario):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    ended = run(scenario, path, backend)
    assert ended.returncode == 0
    assert ended.stderr.count("an asynchronous save failed, and nobody asked for its error") == 1
    assert re.search(rf"OSError: \[Errno 27\] (\w+: )?File too large: '{path}'", ended.stderr), ended.stderr
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.pt"]


def test_a_collected_error_is_not_printed_at_exit(tmp_path, backend):
    ended = run("error_collected", tmp_path / "model.pt", backend)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_sigterm_leaves_the_old_file_and_the_next_save_cleans_up(tmp_path, backend):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    ended = run("terminated", path, backend)
    assert ended.returncode == -signal.SIGTERM
    assert path.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 2
    age_temporaries(tmp_path)
    sio.save_async({"w": 1}, path, backend=backend).result()
    assert os.listdir(tmp_path) == ["model.pt"] and torch.load(path) == {"w": 1}
