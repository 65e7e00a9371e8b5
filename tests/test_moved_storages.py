"""Storages without memory of their own, and storages whose memory a callback takes away while they are saved."""

import io
import multiprocessing
import os

import pytest
import torch
from conftest import require_torch_module
from oracle import names_in

import statedict_io as sio
from statedict_io.backends import choose, device_copies, protocol
from statedict_io.pickles.pickling import PythonStorageTable

NBYTES = 24 << 20  # several regions, and more than a save has in flight


def save_async(obj, f, **options):
    sio.save_async(obj, f, **options).result(timeout=300)


SAVES = {
    "save": sio.save,
    "save to an object": lambda obj, _, **options: sio.save(obj, io.BytesIO(), **options),
    "save_async": save_async,
    "save, skip_data": lambda obj, path, **options: _skipping_data(sio.save, obj, path, **options),
}


def _skipping_data(save, *args, **options):
    with torch.serialization.skip_data():
        save(*args, **options)


def raised_by(call):
    try:
        call()
    except Exception as e:
        return type(e), str(e)
    return None


@pytest.mark.parametrize("transform", [torch.func.functionalize, torch.func.vmap, torch.func.grad])
@pytest.mark.parametrize("name", SAVES)
def test_a_storage_without_memory_raises_what_torch_raises(name, transform, backend, tmp_path):
    """functionalize hands out tensors whose storages have a size and no address."""
    found = []

    def save_inside(x):
        obj = {"plain": torch.ones(3), "inside": [x, x.detach()]}
        found.append(raised_by(lambda: torch.save(obj, io.BytesIO())))
        found.append(raised_by(lambda: SAVES[name](obj, tmp_path / "model.pt", backend=backend)))
        return x.sum()

    transform(save_inside)(torch.ones(4))
    assert found[0] is not None and found[1] == found[0]
    assert names_in(tmp_path) == []


def test_strips_of_a_storage_without_memory(backend, tmp_path):
    found = []
    (tmp_path / "model.pt").write_bytes(bytes(64))

    def write_inside(x):
        strip = protocol.Strip(0, 0, 0, 16, 1, 16, 0)
        found.append(
            raised_by(
                lambda: choose(backend).write_strips(
                    str(tmp_path / "model.pt"),
                    [x.untyped_storage()],
                    [strip],
                    durable=False,
                    compute_crc32=True,
                    progress=None,
                )
            )
        )
        return x

    torch.func.functionalize(write_inside)(torch.ones(4))
    assert found == [(RuntimeError, "Attempted to access the data pointer on an invalid python storage.")]


@pytest.mark.parametrize("name", SAVES)
def test_an_emptied_storage_is_saved_as_torch_saves_it(name, backend, tmp_path):
    emptied, storage = torch.ones(100), torch.ones(5).untyped_storage()
    emptied.untyped_storage().resize_(0)
    storage.resize_(0)
    for obj in (emptied, storage, {"a": emptied, "b": torch.ones(2)}):
        assert raised_by(lambda obj=obj: SAVES[name](obj, tmp_path / "model.pt", backend=backend)) is None


def empty_in_callback(storage, at):
    calls = []

    def callback(*_):
        calls.append(None)
        if len(calls) == at:
            storage.resize_(0)

    return callback


@pytest.mark.parametrize(("where", "at"), [("progress", 1), ("write", 1), ("write", 3)])
def test_a_callback_that_resizes_what_is_being_saved(where, at, backend, tmp_path):
    """An error, and the storage can be resized again afterwards; it died of SIGSEGV."""
    tensor = torch.ones(NBYTES // 4)
    other = torch.ones(1 << 20)
    callback = empty_in_callback(tensor.untyped_storage(), at)
    with pytest.raises(RuntimeError, match=r"not resizable|was resized or moved while it was being saved"):
        if where == "progress":
            sio.save([tensor, other], tmp_path / "model.pt", backend=backend, progress=callback)
        else:
            sio.save([tensor, other], io.BufferedWriter(Calling(callback), 1), backend=backend)
    assert names_in(tmp_path) == []
    tensor.untyped_storage().resize_(8)
    assert tensor.untyped_storage().nbytes() == 8
    sio.save([other], tmp_path / "model.pt", backend=backend)


class Calling(io.RawIOBase):
    def __init__(self, callback):
        self._callback = callback

    def writable(self):
        return True

    def write(self, data):
        self._callback()
        return memoryview(data).nbytes


def test_a_save_within_a_callback_does_not_let_go_of_the_storage(tmp_path):
    """Two saves hold it; the first to end leaves it held."""
    tensor = torch.ones(NBYTES // 4)
    calls = []

    def callback(*_):
        calls.append(None)
        if len(calls) == 1:
            sio.save(tensor, tmp_path / "inner.pt", backend="native")
            assert not tensor.untyped_storage().resizable()

    require_torch_module()
    sio.save(tensor, tmp_path / "outer.pt", backend="native", progress=callback)
    assert calls and tensor.untyped_storage().resizable()
    assert (tmp_path / "inner.pt").stat().st_size == (tmp_path / "outer.pt").stat().st_size


def test_a_storage_resized_between_plan_and_writing(backend, tmp_path):
    """A save that waits for memory has planned, and does not read yet."""
    tensor = torch.ones(NBYTES // 4)
    table = PythonStorageTable()
    table.key_of(tensor.untyped_storage(), torch.float32)
    records = protocol.Records(head=[("data.pkl", b"x")], table=table, tail=[], skip_data=False)
    archive = choose(backend).plan("model", records, alignment=64, compute_crc32=True)
    tensor.untyped_storage().resize_(64)
    descriptor = os.open(tmp_path / "model.pt", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(RuntimeError, match="data/0 was resized or moved while it was being saved"):
            archive.write_fd(descriptor, durable=False, progress=None)
    finally:
        os.close(descriptor)


def test_a_child_forked_during_a_save_can_resize(backend, tmp_path):
    tensor = torch.ones(NBYTES // 4)
    codes = []

    def resize():
        tensor.untyped_storage().resize_(8)
        os._exit(0)

    def fork(*_):
        if not codes:
            child = multiprocessing.get_context("fork").Process(target=resize)
            child.start()
            child.join(60)
            codes.append(child.exitcode)

    sio.save(tensor, tmp_path / "model.pt", backend=backend, progress=fork)
    assert codes == [0]


def test_under_jit_trace_the_same_bytes(backend, tmp_path):
    """Sizes are tensors there, and pickled as such."""
    written = []

    class Saving(torch.nn.Module):
        def forward(self, x):
            obj = {"x": x, "new": torch.ones(3), "parameter": torch.nn.Parameter(torch.ones(2))}
            for name, save in (("stock", torch.save), ("ours", sio.save)):
                (tmp_path / name).mkdir(exist_ok=True)
                options = {"backend": backend} if name == "ours" else {}
                save(obj, tmp_path / name / "model.pt", **options)
            written.append([(tmp_path / name / "model.pt").read_bytes() for name in ("stock", "ours")])
            return x + 1

    torch.jit.trace(Saving(), torch.ones(5))
    assert len({stock for stock, _ in written}) > 1, "tracing made no difference"
    assert all(stock == ours for stock, ours in written)


def test_a_copy_through_torch_leaves_a_storage_the_size_that_it_has():
    """set_() made one that had been emptied as large as planned, and what came to lie there was saved. Here on the CPU,
    whose set_() does the same."""
    storage = torch.ones(16, dtype=torch.uint8).untyped_storage()
    storage.resize_(8)
    assert device_copies._device_bytes(storage, 3, 5).tolist() == [1] * 5
    for offset, nbytes in ((0, 16), (4, 5), (9, 1)):
        with pytest.raises(RuntimeError, match="on cpu was resized"):
            device_copies._device_bytes(storage, offset, nbytes)
    assert storage.nbytes() == 8
