"""What was read is freed when it is dropped, without the cyclic collector."""

import gc
import io
import os
import pathlib
import pickle
import weakref

import pytest
import torch

import statedict_io as sio

NBYTES = 16 << 20
OPTIONS = {
    "plain": {},
    "any pickle": {"weights_only": False},
    "pickle module": {"weights_only": False, "pickle_module": pickle},
    "verified": {"verify": True},
    "to the CPU": {"map_location": "cpu"},
    "by a function": {"map_location": lambda storage, location: storage},
    "mapped": {"mmap": True},
}


def resident_nbytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "x.pt")
    torch.save({f"w{i}": torch.randint(0, 256, (NBYTES // 4,), dtype=torch.uint8) for i in range(4)}, path)
    return path


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def assert_frees(action):
    for turn in range(10):
        action()
        if turn == 1:
            before = resident_nbytes()
    # An allocator may keep some; ten calls that freed nothing would be eight files more.
    assert resident_nbytes() - before < 3 * NBYTES


def lazily(path, backend):
    with sio.open_checkpoint(path, backend=backend) as checkpoint:
        return [checkpoint["w0"], checkpoint.get_slice("w1")[5:]]


def dropped_error(path, backend):
    broken = bytearray(pathlib.Path(path).read_bytes())
    broken[NBYTES // 2] ^= 1
    with open(path + ".broken", "wb") as file:
        file.write(broken)
    with pytest.raises(sio.CorruptCheckpointError):
        sio.load(path + ".broken", verify=True, backend=backend)


def of_an_object(path, backend):
    with open(path, "rb") as file:
        sio.load(io.BytesIO(file.read()), backend=backend)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_load_frees(path, options, backend, no_collector):
    assert_frees(lambda: sio.load(path, backend=backend, **options))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize("action", [lazily, dropped_error, of_an_object])
def test_other_ways_of_reading_free(path, action, backend, no_collector):
    assert_frees(lambda: action(path, backend))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_tensor_outlives_what_was_loaded(path, options, backend, no_collector):
    loaded = sio.load(path, backend=backend, **options)
    storages = [weakref.ref(tensor.untyped_storage()) for tensor in loaded.values()]
    tensors = [weakref.ref(tensor) for tensor in loaded.values()]
    del loaded
    assert [ref() for ref in (*tensors, *storages)] == [None] * 8
