"""Asynchronous saves that are slow, fail or are left behind."""

import contextlib
import resource
import time

import pytest
from async_states import MIB, random_bytes

import statedict_io as sio
from statedict_io.writing.in_flight import register

SLOW = 10 * MIB  # bytes per second


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    """No save in flight and no error uncollected, before and after."""
    yield
    with contextlib.suppress(Exception):
        sio.wait_all(60)
    left = []
    while (save := register.take_uncollected()) is not None:
        left.append(save)
    assert left == [], "a test left errors that nobody collected"


@contextlib.contextmanager
def full_disk(nbytes=MIB):
    """No file of this process can be longer."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def failed_save(path, backend):
    """A PendingSave that has ended in an error which nobody has asked for."""
    with full_disk():
        pending = sio.save_async({"w": random_bytes(3 * MIB, 0)}, path, backend=backend)
        while not pending.done():
            time.sleep(0.001)
    return pending


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("cannot be pickled")


def pool_nbytes(backend):
    if backend == "native":
        from statedict_io import _core

        return _core.snapshot_pool_nbytes()
    from statedict_io.backends import arenas

    return arenas._nbytes
