"""What was read is freed when it is dropped, without the cyclic collector."""

import gc
import io
import os
import pathlib
import pickle
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp

import statedict_io as sio
from statedict_io.conversion import convert
from statedict_io.dcp import SingleFileReader, SingleFileWriter

NBYTES = 16 << 20
# Above the largest threshold of glibc (32 MiB, man 3 mallopt) freed memory goes back to the system at once.
STATE_NBYTES = 40 << 20
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
    for turn in range(7):
        action()
        if turn == 1:
            before = resident_nbytes()
    # An allocator may keep some; seven calls that freed nothing would be five files more.
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


def refused_value(path, backend):
    """An error with a traceback whose frames have seen all tensors."""
    torch.save({"w": torch.zeros(STATE_NBYTES, dtype=torch.uint8), "value": pathlib.Path("x")}, path)
    with pytest.raises(pickle.UnpicklingError):
        sio.load(path, backend=backend)


def verified(path, backend):
    assert sio.verify(path).ok


def through_a_url(path, backend):
    pytest.importorskip("fsspec")
    sio.load(pathlib.Path(path).as_uri(), backend=backend)


def converted(path, backend):
    convert(path, path + ".safetensors")
    convert(path + ".safetensors", path + ".again.pt")


def through_dcp(path, backend):
    state = {"w0": torch.empty(NBYTES // 4, dtype=torch.uint8)}
    dcp.load(state, storage_reader=SingleFileReader(path), no_dist=True)
    dcp.save(state, storage_writer=SingleFileWriter(path + ".by_dcp.pt"), no_dist=True)


def new_state():
    return {"w": torch.full((STATE_NBYTES,), 7, dtype=torch.uint8)}


def saved(path, backend):
    sio.save(new_state(), path, backend=backend)
    sio.save(new_state(), io.BytesIO(), backend=backend)


def saved_asynchronously(path, backend):
    sio.save_async(new_state(), path, backend=backend).result()


def not_picklable(path, backend):
    for save in (sio.save, sio.save_async):
        with pytest.raises((AttributeError, pickle.PicklingError)):
            save({**new_state(), "function": lambda: None}, path, backend=backend)


def not_written(path, backend):
    missing = os.path.join(path + ".missing", "model.pt")
    with pytest.raises((OSError, RuntimeError)):
        sio.save(new_state(), missing, backend=backend)


WAYS = [
    lazily,
    dropped_error,
    of_an_object,
    refused_value,
    verified,
    through_a_url,
    converted,
    through_dcp,
    saved,
    saved_asynchronously,
    not_picklable,
    not_written,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize("action", WAYS)
def test_other_ways_free(path, action, backend, no_collector):
    assert_frees(lambda: action(path, backend))


def test_an_error_that_is_kept_keeps_no_tensor(path, backend, no_collector):
    """Of a save whose state the caller has dropped; where the error says where it came up."""
    state = new_state()
    tensor = weakref.ref(state["w"])
    handle = sio.save_async(state, path, backend=backend, progress=lambda *_: 1 / 0)
    error = handle.exception()
    assert isinstance(error, ZeroDivisionError)
    del state
    assert tensor() is None


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_tensor_outlives_what_was_loaded(path, options, backend, no_collector):
    loaded = sio.load(path, backend=backend, **options)
    storages = [weakref.ref(tensor.untyped_storage()) for tensor in loaded.values()]
    tensors = [weakref.ref(tensor) for tensor in loaded.values()]
    del loaded
    assert [ref() for ref in (*tensors, *storages)] == [None] * 8
