"""Threads and processes that save at once, on one path and on many; forks; the end of the interpreter."""

import os
import pathlib
import threading
import zipfile

import pytest
import torch
import warm_process

import statedict_io as sio
from faults.concurrency_process import stamp_of, stamped
from faults.temporary_files import age_temporaries

PROCESS = pathlib.Path(__file__).with_name("concurrency_process.py")


def in_threads(actions):
    errors = []

    def run(action):
        try:
            action()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_threads_on_one_path(backend, tmp_path):
    path, stop, reads = tmp_path / "model.pt", threading.Event(), []
    sio.save(stamped(0), path, backend=backend)

    def saver(number):
        while True:
            for i in range(5):
                sio.save(stamped(number * 100 + i), path, backend=backend, durable=i == 0)
            if len(reads) > 3:
                break

    def reader():
        while not stop.is_set():
            reads.append(stamp_of(path))

    looking_on = threading.Thread(target=reader)
    looking_on.start()
    try:
        in_threads([lambda n=n: saver(n) for n in range(6)])
    finally:
        stop.set()
        looking_on.join()
    assert all(stamp % 100 < 5 for stamp in reads)
    assert stamp_of(path) % 100 == 4
    assert zipfile.ZipFile(path).testzip() is None
    assert os.listdir(tmp_path) == ["model.pt"]


def test_threads_on_many_paths(backend, tmp_path):
    in_threads([lambda n=n: sio.save(stamped(n), tmp_path / f"{n}.pt", backend=backend) for n in range(8)])
    assert [stamp_of(tmp_path / f"{n}.pt") for n in range(8)] == list(range(8))
    assert len(os.listdir(tmp_path)) == 8


@pytest.mark.parametrize(
    "what",
    [
        "one_path_many_processes",
        "many_paths_many_processes",
        "fork_while_another_thread_saves",
        "fork_in_the_middle",
        "exit_with_a_thread_saving",
    ],
)
def test_processes(what, backend, tmp_path):
    done = warm_process.run(PROCESS, what, tmp_path, backend, timeout=100)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert not [name for name in os.listdir(tmp_path) if not name.endswith(".pt")]
    if what == "exit_with_a_thread_saving":
        assert stamp_of(tmp_path / "model.pt") == 1


def test_exit_in_the_middle_of_a_daemon_threads_save(backend, tmp_path):
    """No abort, no hang; what is left is a whole file, and perhaps a temporary that the next save removes."""
    done = warm_process.run(PROCESS, "exit_with_a_daemon_thread_saving", tmp_path, backend, timeout=100)
    assert done.stdout == "exits\n"
    assert done.returncode == 0, done.stderr
    assert stamp_of(tmp_path / "model.pt") in (0, 1)
    age_temporaries(tmp_path)
    sio.save({"weight": torch.ones(3)}, tmp_path / "model.pt", backend=backend)
    assert os.listdir(tmp_path) == ["model.pt"]
