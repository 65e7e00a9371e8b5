"""Saves by the hundred, half of them failing: nothing adds up."""

import contextlib
import errno
import gc
import os

import pytest
import torch

import statedict_io as sio


def resident_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("cannot be pickled")


def fails_in_progress(*_):
    raise OSError(errno.ENOSPC, "as from a full disk")


@pytest.mark.parametrize("number", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_descriptors_threads_and_memory_stay_flat(number, backend, tmp_path):
    path = tmp_path / "in" / "model.pt"
    path.parent.mkdir()
    obj = {"weight": torch.ones(1 << 20)}  # 4 MiB: direct, where the disk takes it
    broken = {**obj, "last": Unpicklable()}

    def save_once(i):
        with contextlib.suppress(OSError, RuntimeError):
            if i % 4 == 1:
                sio.save(broken, path, backend=backend, durable=i % 8 == 1)
            elif i % 4 == 3:
                sio.save(obj, path, backend=backend, durable=i % 8 == 3, progress=fails_in_progress)
            else:
                sio.save(obj, path, backend=backend, durable=i % 8 == 0)

    def state():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    for i in range(24):
        save_once(i)
    gc.collect()
    before, memory = state(), resident_kib()
    for i in range(number):
        save_once(i)
    gc.collect()
    assert state() == before
    assert resident_kib() - memory < 6 << 10
    assert os.listdir(path.parent) == ["model.pt"]
    assert torch.equal(torch.load(path)["weight"], obj["weight"])
