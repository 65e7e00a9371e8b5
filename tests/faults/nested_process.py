"""Saves inside saves of the same thread; each is run by test_nested_saves.py, with a limit on its time.

nested_process.py PLACE ENTRY PATH OTHER {native,torch}: at PLACE in an outer save to PATH, ENTRY is called with OTHER.
"""

import os
import signal
import sys
import threading
import time

import torch

import statedict_io as sio
from statedict_io.writing import async_saving, in_flight

MIB = 1 << 20


def state(value, nbytes=9 * MIB):
    return {"value": value, "w": torch.full((nbytes,), value, dtype=torch.uint8)}


def enter(name, path, backend):
    """The inner call; returns when its save, if it is one, is on its way."""
    if name == "save":
        sio.save(state(2), path, backend=backend)
    elif name == "fastsave":
        sio.fastsave(state(2), path, backend=backend)
    elif name == "patched":
        with sio.patch_torch(backend=backend):
            torch.save(state(2), path)
    elif name == "async":
        sio.save_async(state(2), path, backend=backend)
    elif name == "result":
        sio.save_async(state(2), path, backend=backend, max_in_flight=1).result()
    elif name == "full":
        assert sio.save_async(state(2), path, backend=backend, max_snapshot_nbytes=10 * MIB).exception() is None
    elif name == "with":
        with sio.save_async(state(2), path, backend=backend):
            pass
    elif name == "wait_all":
        sio.wait_all()
    elif name == "release_buffers":
        sio.release_buffers()


class Once:
    def __init__(self, action):
        self.action, self.done = action, False

    def __call__(self, *_):
        if not self.done:
            self.done = True
            self.action()


class Reduces:
    def __init__(self, action):
        self.action = action

    def __reduce__(self):
        self.action()
        import collections

        return collections.OrderedDict, ()


def raised_in(module, name, action):
    """Sends this process a signal as ``module.name`` is called in the main thread; its handler is ``action``."""
    original = getattr(module, name)
    ring = Once(lambda: os.kill(os.getpid(), signal.SIGTERM))
    signal.signal(signal.SIGTERM, lambda *_: action())

    def called(*args, **options):
        if threading.current_thread() is threading.main_thread():
            ring()
        return original(*args, **options)

    setattr(module, name, called)


def pickling(path, action, backend, save):
    save([state(1), Reduces(action)], path, backend=backend)


def progress(path, action, backend, save):
    save(state(1), path, backend=backend, progress=action)


def admission(path, action, backend, save):
    sio.save_async(state(0), f"{path}.slow", backend=backend, max_bytes_per_second=20 * MIB)

    def act(*_):
        if in_flight._running.calls:  # else the alarm came before the outer save had begun: the next one will not
            signal.setitimer(signal.ITIMER_REAL, 0)
            action()

    signal.signal(signal.SIGALRM, act)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    save(state(1), path, backend=backend, max_in_flight=1)


def snapshot(path, action, backend, save):
    from statedict_io.backends import native, python

    for archive in (native.NativeFile, python.PythonFile):
        raised_in(archive, "snapshot", action)
    save(state(1), path, backend=backend)


def in_call(path, action, backend, save):
    raised_in(async_saving, "_write", action)
    save(state(1), path, backend=backend, max_snapshot_nbytes=0)


def thread_start(path, action, backend, save):
    raised_in(threading.Thread, "start", action)
    save(state(1), path, backend=backend)


def third_thread(path, action, backend, save):
    """Another thread's save to the path is queued between the outer one, which holds it up, and the inner one."""

    def between():
        thread = threading.Thread(target=lambda: sio.save_async(state(3), path, backend=backend, max_in_flight=9))
        thread.start()
        thread.join()
        action()

    snapshot(path, between, backend, save)


if __name__ == "__main__":
    place, entry, path, other, backend = sys.argv[1:]
    action = Once(lambda: enter(entry, other, backend))
    how, _, place = place.rpartition("-")
    save = sio.save if how == "sync" else sio.save_async
    globals()[place](path, action, backend, save)
    sio.wait_all()
    assert action.done
    assert in_flight.register.in_flight == []
    print("done", time.process_time())
