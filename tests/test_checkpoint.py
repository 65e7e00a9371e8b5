"""open_checkpoint: names, single tensors, slices, against torch.load of the whole; and what is read for them."""

import concurrent.futures
import os
import pickle
import signal
import threading
import warnings
import zipfile

import pytest
import torch
from conftest import require_native
from corpus import CORPUS
from corpus_case import filled
from equality import difference
from flat_tensors import deferred, flat, values_of
from load_comparison import OTHER_WRITERS, rezipped

import statedict_io as sio
from statedict_io.pickles import unpickling


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CORPUS)
def test_every_tensor_of_the_corpus(name, backend, tmp_path):
    path = tmp_path / "model.pt"
    try:
        torch.save(CORPUS[name](), path)
        expected = torch.load(path)
    except (pickle.UnpicklingError, RuntimeError, Exception) as e:
        pytest.skip(f"torch refuses it: {type(e).__name__}")
    if name == "storage_with_a_partial_last_element":
        pytest.skip("this torch does not notice that a record is longer than data.pkl says")
    try:
        tensors = dict(flat(expected))
        values = {key: values_of(tensor) for key, tensor in tensors.items()}
    except RecursionError:
        pytest.skip("contains itself")
    except NotImplementedError as e:
        pytest.skip(f"this torch cannot copy it: {e}")
    with sio.open_checkpoint(path, backend=backend) as checkpoint:
        assert set(checkpoint) == set(tensors)
        for key, tensor in tensors.items():
            found = difference(values[key], values_of(checkpoint[key]), key)
            assert found is None, found
            info = checkpoint.info(key)
            assert info.dtype == tensor.dtype
            if not tensor.is_nested:
                assert info.shape == tensor.shape


def test_names(backend, tmp_path):
    obj = {
        "model": {"a.b": filled(1), "c": [filled(2), (filled(3), {"d": filled(4)})], 5: filled(5), None: filled(6)},
        "x": {"y": filled(7), "z": filled(10)},
        "x.y": filled(8),
        "epoch": 3,
        "nothing": None,
        "": filled(9),
    }
    torch.save(obj, tmp_path / "model.pt")
    with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
        sizes = {name: len(checkpoint[name]) for name in checkpoint}
        assert sizes == {
            "model.a.b": 1, "model.c.0": 2, "model.c.1.0": 3, "model.c.1.1.d": 4, "model.5": 5, "model.None": 6,
            "x.y": 8, "x.z": 10, "": 9,
        }  # fmt: skip
        assert set(checkpoint.others) == {"epoch", "nothing"}
        assert len(checkpoint) == 9 and "x.y" in checkpoint and "x" not in checkpoint
        for missing in ("x", "no", None, 3):
            with pytest.raises(KeyError):
                checkpoint[missing]
            with pytest.raises(KeyError):
                checkpoint.info(missing)
        with pytest.raises(TypeError):
            checkpoint["x.y"] = filled(1)


def test_a_tensor_alone(backend, tmp_path):
    torch.save(filled(3, 4), tmp_path / "model.pt")
    with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
        assert list(checkpoint) == [""]
        assert torch.equal(checkpoint[""].view(torch.int32), filled(3, 4).view(torch.int32))


INDICES = [
    0, -1, slice(None), slice(2, 5), slice(None, None, 3), slice(5, 2), (slice(1, 4), slice(2, 9)), (..., 0),
    (0, ..., 3),    (slice(None), 4), (slice(0, 8, 2), slice(1, None, 5)), (None, 3), (3, 4), (), ...,
]  # fmt: skip


def layouts():
    base = filled(16, 24, dtype=torch.int32)
    return {
        "contiguous": base,
        "transposed": base.t(),
        "window": base[3:12, 5:17],
        "steps": base[::2, ::3],
        "expanded": filled(1, 24, dtype=torch.int32).expand(9, 24),
        "three": filled(9, 8, 7, dtype=torch.int16).permute(2, 0, 1),
        "overlapping": filled(64, dtype=torch.uint8).as_strided((10, 12), (3, 2)),
        "complex": filled(12, 13, dtype=torch.complex64).conj(),
        "half": filled(10, 12, dtype=torch.bfloat16),
        "f8": filled(10, 12, dtype=torch.float8_e4m3fn),
        "large": filled(400, 3000, dtype=torch.int64),
        "large transposed": filled(400, 3000, dtype=torch.int64).t(),
    }


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", layouts())
def test_slices(name, compression, backend, tmp_path):
    torch.save({name: layouts()[name]}, tmp_path / "first.pt")
    path = rezipped(tmp_path / "first.pt", tmp_path / "model.pt", compression)
    whole = torch.load(path)[name]
    with sio.open_checkpoint(path, backend=backend) as checkpoint:
        part = checkpoint.get_slice(name)
        assert (part.shape, part.dtype) == (whole.shape, whole.dtype)
        for index in INDICES:
            expected = whole[index]
            found = part[index]
            repeats = expected.numel() > 1 + sum(
                (n - 1) * stride for n, stride in zip(expected.shape, expected.stride(), strict=True)
            )
            assert found.shape == expected.shape and (repeats or found.is_contiguous()), index
            assert found.untyped_storage().nbytes() <= expected.nbytes, index
            assert difference(values_of(expected, False), values_of(found, False)) is None, index
        for index in ([0, 1], torch.tensor([1]), torch.tensor([True] * whole.shape[0]), "a", True):
            with pytest.raises(TypeError):
                part[index]
        for index in (99999, (0, 99999), (0,) * 9):
            with pytest.raises(IndexError):
                part[index]
        assert difference(values_of(whole), values_of(checkpoint[name])) is None


def test_slices_of_what_is_no_plain_tensor(backend, tmp_path):
    sparse = torch.eye(5).to_sparse()
    quantized = torch.quantize_per_tensor(torch.rand(6, 5), 0.1, 3, torch.qint8)
    for kind in (sparse, quantized):
        torch.save({"x": kind, "plain": filled(3)}, tmp_path / "model.pt")
        with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
            assert difference(kind[1].clone(), checkpoint.get_slice("x")[1]) is None
            assert difference(kind, checkpoint["x"]) is None
            assert difference(values_of(filled(3)), values_of(checkpoint["plain"])) is None
            assert checkpoint.info("x").offset is None


def test_info_says_where_the_bytes_are(backend, tmp_path):
    obj = {"a": filled(10, 20), "part": filled(1000)[100:300], "none": filled(0, 3)}
    torch.save(obj, tmp_path / "model.pt")
    content = (tmp_path / "model.pt").read_bytes()
    with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
        for name, tensor in obj.items():
            info = checkpoint.info(name)
            assert info == sio.TensorInfo(tensor.shape, tensor.dtype, info.offset, tensor.nbytes)
            assert content[info.offset : info.offset + info.nbytes] == tensor.numpy().tobytes()


@pytest.mark.parametrize("writer", OTHER_WRITERS)
def test_files_of_other_writers(writer, backend, tmp_path):
    obj = {f"w{i}": filled(100, seed=i) for i in range(12)} | {"large": filled(1 << 19), "none": filled(0)}
    torch.save(obj, tmp_path / "first.pt")
    path = rezipped(tmp_path / "first.pt", tmp_path / "model.pt", **OTHER_WRITERS[writer])
    if writer == "unknown byte order":
        with pytest.raises(ValueError, match="middle"):
            sio.open_checkpoint(path, backend=backend)
        return
    with sio.open_checkpoint(path, backend=backend) as checkpoint:
        assert difference(dict(torch.load(path)), dict(checkpoint)) is None


def test_a_tensor_that_reaches_beyond_its_storage(backend, tmp_path):
    from hostile import HOSTILE

    (tmp_path / "model.pt").write_bytes(HOSTILE["tensor of 0x100000 elements"](b""))
    with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
        for action in (checkpoint.__getitem__, checkpoint.info, lambda name: checkpoint.get_slice(name)[:1]):
            with pytest.raises(sio.CorruptCheckpointError, match=r"data/0.*5"):
                action("")


def test_reading_does_not_share_memory_and_outlives_the_checkpoint(backend, tmp_path):
    base = filled(1 << 17, dtype=torch.int32)
    torch.save({"a": base, "b": base}, tmp_path / "model.pt")
    with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
        a, b, again = checkpoint["a"], checkpoint["b"], checkpoint["a"]
        a.zero_()
    assert b.equal(base) and again.equal(base)
    with pytest.raises(ValueError, match="closed"):
        checkpoint["a"]
    assert list(checkpoint) == ["a", "b"]


def test_no_warning_and_no_change_of_modes(backend, tmp_path):
    torch.save({"a": filled(3)}, tmp_path / "model.pt")
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
            found = checkpoint["a"], checkpoint.get_slice("a")[1:]
    assert [t.device.type for t in found] == ["cpu", "cpu"]


def test_a_replaced_file_is_still_the_old_one(backend, tmp_path):
    sio.save({"a": filled(1000)}, tmp_path / "model.pt")
    with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
        sio.save({"a": filled(1000, seed=5)}, tmp_path / "model.pt")
        assert difference(checkpoint["a"], filled(1000)) is None


def test_tensors_saved_without_data_need_no_reading(backend, tmp_path):
    torch.save({"large": filled(1 << 16), "m": torch.empty(3, 4, device="meta")}, tmp_path / "model.pt")
    with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
        before = checkpoint._tensors._file.bytes_read
        assert checkpoint["m"].is_meta and checkpoint["m"].shape == (3, 4)
        assert checkpoint._tensors._file.bytes_read == before


def test_modes_are_those_of_nobody(backend, tmp_path):
    """A tensor without data stays, and must not be one of the mode in which it was asked for first."""
    from torch._subclasses import FakeTensorMode

    torch.save(deferred(), tmp_path / "model.pt")
    for mode in (FakeTensorMode, torch.inference_mode, lambda: torch.device("meta")):
        with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
            with mode():
                offsets = [checkpoint.info(name).offset for name in ("rows", "leaf")]
            assert None not in offsets
            for name in ("rows", "leaf"):
                found = checkpoint[name]
                assert type(found) is torch.Tensor and not found.is_inference()
                assert difference(values_of(deferred()[name]), values_of(found)) is None
            assert torch.equal(checkpoint.get_slice("rows")[1:3], deferred()["rows"][1:3])


def test_threads_find_the_same_records(backend, tmp_path):
    """Views of few storages, first asked for by many threads at once."""
    bases = [filled(64, 16, seed=i, dtype=torch.int32) for i in range(8)]
    views = {f"{i}.{row}": base[row] for row in range(64) for i, base in enumerate(bases)}
    torch.save(views, tmp_path / "model.pt")
    for _ in range(5):
        with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                infos = dict(zip(views, pool.map(checkpoint.info, views), strict=True))
                records = dict(zip(views, pool.map(checkpoint.record, views), strict=True))
            assert all(records[name] == f"data/{name.split('.')[0]}" for name in views)
            assert all(info.offset is not None for info in infos.values())


def test_a_child_that_is_forked_while_another_thread_makes_a_tensor(tmp_path):
    require_native()
    torch.save({"first": filled(3), "w": filled(5)}, tmp_path / "model.pt")
    held, enough = threading.Event(), threading.Event()

    def hold():
        with unpickling._deferred_making:
            held.set()
            enough.wait()

    thread = threading.Thread(target=hold)
    with sio.open_checkpoint(tmp_path / "model.pt", backend="native") as checkpoint:
        thread.start()
        held.wait()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            os._exit(0 if checkpoint.info("w").shape == (5,) else 1)
        status = os.waitpid(child, 0)[1]
        enough.set()
        thread.join()
    assert status == 0


@pytest.mark.parametrize("inside", [True, False])
def test_a_storage_in_a_key_is_not_printed(inside, backend, tmp_path):
    """Element by element, which took 5 s for 16 KB."""
    storage = torch.zeros(2000, dtype=torch.uint8).storage()
    torch.save({(storage,) if inside else storage: torch.ones(2)}, tmp_path / "model.pt")
    with (
        pytest.raises(sio.StateDictIOError, match="parts"),
        sio.open_checkpoint(tmp_path / "model.pt", backend=backend),
    ):
        pass
