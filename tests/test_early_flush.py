"""A durable save of the Python backend has the device write while the rest comes."""

import pytest
import torch

import statedict_io as sio
from statedict_io.backends import python, strips

MIB = 1 << 20


@pytest.fixture
def flushed(monkeypatch):
    """The ranges (begin, end) that the system was asked to write."""
    monkeypatch.setattr(python, "_FLUSH_NBYTES", 2 * MIB)
    ranges = []
    real = strips.start_flushing

    def start(fd, offset, nbytes):
        ranges.append((offset, offset + nbytes))
        real(fd, offset, nbytes)

    monkeypatch.setattr(strips, "start_flushing", start)
    return ranges


@pytest.fixture
def state():
    return {str(i): torch.full((MIB // 4 + i,), float(i)) for i in range(9)}


def test_a_durable_save_flushes_all_but_the_end_front_to_back(flushed, state, tmp_path):
    path = tmp_path / "model.pt"
    sio.save(state, path, backend="python")
    assert len(flushed) >= 3
    ends = [0, *(end for _, end in flushed)]
    assert [begin for begin, _ in flushed] == ends[:-1]
    assert all(end - begin >= 2 * MIB for begin, end in flushed)
    assert path.stat().st_size - 4 * MIB < ends[-1] <= path.stat().st_size
    assert all(torch.load(path)[name].equal(tensor) for name, tensor in state.items())


def test_the_same_in_the_background(flushed, state, tmp_path):
    sio.save_async(state, tmp_path / "model.pt", backend="python").result()
    assert len(flushed) >= 3


def test_a_save_that_is_not_durable_leaves_it_to_the_kernel(flushed, state, tmp_path):
    sio.save(state, tmp_path / "model.pt", backend="python", durable=False)
    assert flushed == []


@pytest.mark.parametrize("call", [None, lambda *_: -1], ids=["there is none", "it fails"])
def test_a_system_that_cannot_writes_the_same(call, flushed, state, monkeypatch, tmp_path):
    monkeypatch.setattr(strips, "_sync_file_range", lambda: call)
    sio.save(state, tmp_path / "model.pt", backend="python")
    assert flushed
    assert all(torch.load(tmp_path / "model.pt")[name].equal(tensor) for name, tensor in state.items())
