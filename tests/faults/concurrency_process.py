"""Processes and threads that save at once.

concurrency_process.py FUNCTION DIRECTORY BACKEND
"""

import builtins
import os
import pathlib
import sys
import threading

import torch

import statedict_io as sio
from faults.killed_children import forked

NBYTES = 6 << 20


def stamped(stamp, nbytes=NBYTES):
    return {"stamp": stamp, "weight": torch.full((nbytes,), stamp % 251, dtype=torch.uint8)}


def stamp_of(path):
    loaded = torch.load(path)
    assert bool((loaded["weight"] == loaded["stamp"] % 251).all())
    return loaded["stamp"]


def fork_and_do(actions):
    """Forks a child for each action; returns their exit statuses."""
    children = [forked(action) for action in actions]
    return [os.waitpid(child, 0)[1] for child in children]


def one_path_many_processes(directory, backend):
    """Six processes, five saves each, and all of them read what is there after each save."""
    path = directory / "model.pt"
    sio.save(stamped(0), path, backend=backend)

    def saver(number):
        for i in range(5):
            sio.save(stamped(number * 100 + i), path, backend=backend, durable=i % 2 == 0)
            assert stamp_of(path) % 100 < 5

    assert fork_and_do([lambda n=n: saver(n) for n in range(6)]) == [0] * 6
    assert stamp_of(path) % 100 == 4, "the last one wins, and each process's last save is its fifth"
    assert os.listdir(directory) == ["model.pt"]


def many_paths_many_processes(directory, backend):
    sio.save(stamped(0), directory / "0.pt", backend=backend)
    actions = [lambda n=n: sio.save(stamped(n), directory / f"{n}.pt", backend=backend) for n in range(8)]
    assert fork_and_do(actions) == [0] * 8
    assert sorted(os.listdir(directory)) == [f"{n}.pt" for n in range(8)]
    assert [stamp_of(directory / f"{n}.pt") for n in range(8)] == list(range(8))


def fork_while_another_thread_saves(directory, backend):
    stop, saves = threading.Event(), []
    # Made before: torch takes locks when it fills tensors, and a fork leaves them locked.
    objects = [stamped(n) for n in range(16)]
    sio.save(objects[1], directory / "thread.pt", backend=backend)  # imports what is needed: Python locks that too

    def keep_saving():
        while not stop.is_set():
            sio.save(objects[1], directory / "thread.pt", backend=backend)
            saves.append(1)

    thread = threading.Thread(target=keep_saving)
    thread.start()
    try:
        for n in range(15):
            assert fork_and_do([lambda n=n: sio.save(objects[n], directory / "child.pt", backend=backend)]) == [0]
            assert stamp_of(directory / "child.pt") == n
    finally:
        stop.set()
        thread.join()
    assert saves and stamp_of(directory / "thread.pt") == 1
    assert sorted(os.listdir(directory)) == ["child.pt", "thread.pt"]


def fork_in_the_middle(directory, backend):
    """A save's own progress callback starts a process, which has the temporary open and ends."""
    forked = []

    def fork_once(done, total):
        if not forked:
            forked.extend(fork_and_do([lambda: sio.save(other, directory / "other.pt", backend=backend)]))

    other, obj = stamped(4), stamped(3, 100 << 20)
    sio.save(obj, directory / "model.pt", backend=backend, progress=fork_once)
    assert forked == [0]
    assert stamp_of(directory / "other.pt") == 4
    (directory / "other.pt").unlink()
    assert stamp_of(directory / "model.pt") == 3
    assert os.listdir(directory) == ["model.pt"]


def exit_with_a_daemon_thread_saving(directory, backend):
    """Returns, and so ends the interpreter, while a save is in its middle."""
    sio.save(stamped(0), directory / "model.pt", backend=backend)
    obj = stamped(1, 200 << 20)
    builtins.kept = obj  # else the thread, if its save ends in time, frees the tensors: torch aborts then
    is_writing = threading.Event()

    def save():
        sio.save(obj, directory / "model.pt", backend=backend, progress=lambda done, total: is_writing.set())

    threading.Thread(target=save, daemon=True).start()
    is_writing.wait()
    print("exits", flush=True)


def exit_with_a_thread_saving(directory, backend):
    obj = stamped(1, 100 << 20)
    threading.Thread(target=lambda: sio.save(obj, directory / "model.pt", backend=backend)).start()


if __name__ == "__main__":
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, and torch waits for them
    globals()[sys.argv[1]](pathlib.Path(sys.argv[2]), sys.argv[3])
