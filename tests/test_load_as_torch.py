"""sio.load against torch.load: the same objects, warnings and exceptions for the same arguments, on both backends."""

import collections
import io
import os
import pickle
import threading
import time

import dill
import pytest
import torch
from corpus import CORPUS
from corpus_case import filled
from equality import difference
from load_comparison import OTHER_WRITERS, both, rezipped, saved, storages_of
from oracle import attempt
from torch.utils.serialization import config

import statedict_io as sio

FORMS = {
    "none": lambda: None,
    "cpu": lambda: "cpu",
    "cpu device": lambda: torch.device("cpu"),
    "dict": lambda: {"cpu": "cpu"},
    "dict to meta": lambda: {"cpu": "meta"},
    "callable": lambda: lambda storage, location: storage,
    "callable that declines": lambda: lambda storage, location: None,
    "callable to meta": lambda: lambda storage, _: torch.UntypedStorage(storage.nbytes(), device="meta"),
    "meta": lambda: "meta",
    "meta device": lambda: torch.device("meta"),
    "cuda": lambda: "cuda:5",
    "nonsense": lambda: "nonsense",
    "wrong type": lambda: 5,
}


@pytest.fixture
def setting():
    """setting(config.load, "mmap", True): for this test. monkeypatch cannot put torch's config back."""
    undo = []

    def set_(section, name, value):
        undo.append((section, name, getattr(section, name)))
        setattr(section, name, value)

    yield set_
    for section, name, value in reversed(undo):
        setattr(section, name, value)


@pytest.mark.parametrize("name", CORPUS)
def test_the_corpus_loads_alike(name, backend, tmp_path):
    path = saved(tmp_path / "model.pt", CORPUS[name])
    if name == "storage_with_a_partial_last_element" and attempt(torch.load, path)[1] is None:
        pytest.skip("this torch does not notice that a record is longer than data.pkl says")
    _, refused = both(path, backend, weights_only=True)
    both(path, backend, weights_only=False)
    if refused is None:
        assert difference(sio.load(path, backend=backend, verify=True), torch.load(path)) is None


# What stands for the rest: plain, views and ties, subclass, attributes, quantized, sparse, refused.
SOME = [
    "non_contiguous_views", "tied_and_overlapping", "module_state_dict", "quantized_per_tensor[torch.qint8]",
    "sparse_coo[torch.float32]", "metadata_on_an_ordered_dict", "module", "conjugate_and_negative_views", "many_small",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SOME)
def test_every_form_of_map_location(name, form, backend, tmp_path):
    path = saved(tmp_path / "model.pt", CORPUS[name])
    both(path, backend, map_location=FORMS[form]())


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("mmap", ["argument", "config"])
def test_mmap(name, mmap, backend, tmp_path, setting):
    path = saved(tmp_path / "model.pt", CORPUS[name])
    if mmap == "config":
        setting(config.load, "mmap", True)
    both(path, backend, **({"mmap": True} if mmap == "argument" else {}))
    assert difference(torch.load(path, weights_only=False), sio.load(path, weights_only=False, verify=True)) is None


def test_ties_are_ties_again(backend, tmp_path):
    base = filled(1 << 18, dtype=torch.uint8)
    obj = {"a": base, "b": base, "tail": base[7:], "other": filled(3), "storage": base.untyped_storage()}
    torch.save(obj, tmp_path / "model.pt")
    loaded = sio.load(tmp_path / "model.pt", backend=backend)
    assert storages_of(loaded.values()) == [0, 0, 0, 3, 4]
    loaded["tail"].zero_()
    assert loaded["b"][7:].eq(0).all() and loaded["b"][:7].ne(0).all()
    assert loaded["storage"].data_ptr() == loaded["a"].untyped_storage().data_ptr()


def test_tensors_own_their_memory(backend, tmp_path):
    torch.save({"large": filled(1 << 20), "small": filled(3)}, tmp_path / "model.pt")
    loaded = sio.load(tmp_path / "model.pt", backend=backend)
    (tmp_path / "model.pt").write_bytes(b"gone")
    expected = {"large": filled(1 << 20), "small": filled(3)}
    assert difference(loaded, expected) is None
    loaded["large"] += 1
    assert pickle.loads(pickle.dumps(loaded["small"])).equal(expected["small"])


@pytest.mark.parametrize("weights_only", [True, False])
def test_storages_cannot_be_resized_by_a_tensor_that_claims_more(weights_only, backend, tmp_path):
    torch.save({"a": filled(8), "e": filled(0)}, tmp_path / "model.pt")
    loaded = sio.load(tmp_path / "model.pt", weights_only=weights_only, backend=backend)
    assert not loaded["a"].untyped_storage().resizable() and not loaded["e"].untyped_storage().resizable()


class Attacker:
    def __reduce__(self):
        return (print, ("unpickled",))


ARGUMENTS = {
    "pickle module with weights_only": {"pickle_module": pickle, "weights_only": True},
    "pickle module": {"pickle_module": pickle, "weights_only": False},
    "dill": {"pickle_module": dill, "weights_only": False},
    "encoding": {"encoding": "latin1", "weights_only": False},
    "encoding with weights_only": {"encoding": "bytes"},
    "unknown pickle argument": {"weights_only": False, "no_such": 1},
    "weights_only None": {"weights_only": None},
    "mmap False": {"mmap": False},
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_mean_what_they_mean_to_torch(arguments, backend, tmp_path):
    torch.save({"a": filled(8), "b": b"bytes", "n": None}, tmp_path / "model.pt")
    both(tmp_path / "model.pt", backend, **ARGUMENTS[arguments])


@pytest.mark.parametrize("obj", [Attacker(), collections.deque([1]), {"f": print}], ids=["reduce", "deque", "function"])
def test_what_the_restricted_unpickler_refuses(obj, backend, tmp_path, capsys):
    torch.save(obj, tmp_path / "model.pt")
    _, reference = both(tmp_path / "model.pt", backend)
    assert isinstance(reference, pickle.UnpicklingError)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(protocol, backend, tmp_path):
    torch.save({"a": filled(8), "b": [filled(3)] * 2}, tmp_path / "model.pt", pickle_protocol=protocol)
    for weights_only in (True, False):
        both(tmp_path / "model.pt", backend, weights_only=weights_only)


def test_environment_variables_of_torch(backend, tmp_path, monkeypatch):
    torch.save(collections.deque([1]), tmp_path / "model.pt")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    both(tmp_path / "model.pt", backend, weights_only=False)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    both(tmp_path / "model.pt", backend, weights_only=False)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    both(tmp_path / "model.pt", backend, weights_only=None)
    with pytest.raises(pickle.UnpicklingError):  # the default is no wish that a variable may override
        sio.load(tmp_path / "model.pt", backend=backend)


@pytest.mark.parametrize("path", ["missing.pt", "", "a\0b", "empty.pt", "text.pt", "x.safetensors"])
def test_paths_that_are_no_checkpoints(path, backend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_bytes(b"no checkpoint at all")
    _, reference = both(path, backend)
    assert reference is not None


@pytest.mark.parametrize("f", [None, 5, [], object(), io.StringIO("text")], ids=lambda f: type(f).__name__)
def test_what_is_no_file(f, backend):
    _, reference = both(f, backend)
    assert reference is not None


@pytest.mark.parametrize("verify", [False, True])
def test_file_objects_from_where_they_stand(verify, backend, tmp_path):
    obj = {"a": filled(1000), "b": [1, "two"]}
    with open(tmp_path / "file", "w+b") as file:
        file.write(b"before")
        torch.save(obj, file)
        file.seek(6)
        assert difference(sio.load(file, backend=backend, verify=verify), obj) is None
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    assert difference(sio.load(buffer, backend=backend, verify=verify), obj) is None
    damaged = bytearray(buffer.getvalue())
    damaged[damaged.find(obj["a"].numpy().tobytes()) + 5] ^= 1
    if verify:
        with pytest.raises(sio.CorruptCheckpointError, match=r"data/0.*\ba\b"):
            sio.load(io.BytesIO(damaged), backend=backend, verify=True)


def test_the_legacy_format(backend, tmp_path):
    torch.save({"a": filled(8)}, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    both(tmp_path / "model.pt", backend)
    both(tmp_path / "model.pt", backend, mmap=True)
    with pytest.raises(ValueError, match="legacy"):
        sio.load(tmp_path / "model.pt", backend=backend, verify=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(backend, tmp_path):
    torch.jit.script(torch.nn.Linear(2, 3)).save(tmp_path / "model.pt")
    both(tmp_path / "model.pt", backend)
    module = sio.load(tmp_path / "model.pt", weights_only=False, backend=backend, verify=True)
    assert isinstance(module, torch.jit.ScriptModule)


def test_a_safetensors_path(backend, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"a": filled(8)}, tmp_path / "model.safetensors")
    both(tmp_path / "model.safetensors", backend)
    with pytest.raises(ValueError, match="safetensors"):
        sio.load(tmp_path / "model.safetensors", backend=backend, verify=True)


def test_fake_tensors_and_skip_data(backend, tmp_path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.save({"a": filled(8)}, tmp_path / "model.pt")
    with FakeTensorMode():
        expected, found = torch.load(tmp_path / "model.pt"), sio.load(tmp_path / "model.pt", backend=backend)
    assert type(found["a"]) is type(expected["a"]) and found["a"].device == expected["a"].device
    offset = expected["a"].untyped_storage()._checkpoint_offset
    assert found["a"].untyped_storage()._checkpoint_offset == offset
    with torch.serialization.skip_data():
        assert sio.load(tmp_path / "model.pt", backend=backend)["a"].shape == (8,)


def test_modes_of_the_caller(backend, tmp_path):
    torch.save({"a": filled(8)}, tmp_path / "model.pt")
    for mode in (torch.device("meta"), torch.inference_mode(), torch.no_grad()):
        with mode:
            found = sio.load(tmp_path / "model.pt", backend=backend)
        assert difference(found, {"a": filled(8)}) is None


@pytest.mark.parametrize("writer", OTHER_WRITERS)
def test_archives_of_other_writers(writer, backend, tmp_path):
    obj = {f"w{i}": filled(100, seed=i) for i in range(12)} | {"large": filled(1 << 19), "none": filled(0)}
    torch.save(obj, tmp_path / "first.pt")
    path = rezipped(tmp_path / "first.pt", tmp_path / "model.pt", **OTHER_WRITERS[writer])
    both(path, backend, weights_only=True)
    both(path, backend, weights_only=False)
    if writer not in ("big endian", "unknown byte order"):
        assert difference(sio.load(path, backend=backend, verify=True), obj) is None


@pytest.mark.parametrize("endianness", ["LITTLE", "BIG", "NATIVE"])
def test_the_default_byte_order_of_files_that_do_not_say(endianness, backend, tmp_path, setting):
    torch.save({"a": filled(8), "d": filled(4, dtype=torch.complex64)}, tmp_path / "first.pt")
    path = rezipped(tmp_path / "first.pt", tmp_path / "model.pt", drop=("byteorder",))
    setting(config.load, "endianness", torch.serialization.LoadEndianness[endianness])
    expected, _ = both(path, backend)
    with sio.open_checkpoint(path, backend=backend) as checkpoint:
        assert difference(dict(checkpoint), expected) is None


def test_crc_off_and_other_alignments(backend, tmp_path, setting):
    setting(config.save, "storage_alignment", 4096)
    setting(config.save, "compute_crc32", False)
    torch.save({"a": filled(1000)}, tmp_path / "model.pt")
    both(tmp_path / "model.pt", backend)
    assert difference(sio.load(tmp_path / "model.pt", verify=True, backend=backend), {"a": filled(1000)}) is None


def test_threads_load_at_once(backend, tmp_path):
    for i in range(4):
        torch.save({"a": filled(1 << 16, seed=i), "b": [filled(5, seed=i)] * 3}, tmp_path / f"{i}.pt")
    errors = []

    def work(i):
        for _ in range(5):
            found = difference(
                sio.load(tmp_path / f"{i}.pt", backend=backend),
                {"a": filled(1 << 16, seed=i), "b": [filled(5, seed=i)] * 3},
            )
            if found:
                errors.append(found)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert errors == []


def test_the_garbage_collector_is_as_it_was(backend, tmp_path):
    import gc

    torch.save({"a": filled(8)}, tmp_path / "model.pt")
    torch.save(collections.deque(), tmp_path / "refused.pt")
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            sio.load(tmp_path / "model.pt", backend=backend)
            attempt(sio.load, tmp_path / "refused.pt", backend=backend)
            assert gc.isenabled() == enabled
        finally:
            gc.enable()


def test_progress_rises_to_the_total(backend, tmp_path):
    torch.save({"a": filled(5 << 20), "b": filled(1000)}, tmp_path / "model.pt")
    calls = []
    sio.load(tmp_path / "model.pt", backend=backend, progress=lambda done, total: calls.append((done, total)))
    assert calls and [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == calls[-1][1] > 0

    def fail(done, total):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        sio.load(tmp_path / "model.pt", backend=backend, progress=fail)


@pytest.mark.parametrize("value", ["cuda", "", None, 1])
def test_an_unknown_backend(value, tmp_path):
    with pytest.raises(ValueError, match="backend"):
        sio.load(tmp_path / "model.pt", backend=value)


def test_no_descriptor_and_no_thread_stays(backend, tmp_path):
    torch.save({"a": filled(3 << 20)}, tmp_path / "model.pt")
    torch.save(collections.deque(), tmp_path / "refused.pt")
    sio.load(tmp_path / "model.pt", backend=backend)
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for _ in range(5):
        sio.load(tmp_path / "model.pt", backend=backend)
        attempt(sio.load, tmp_path / "refused.pt", backend=backend)
        attempt(sio.open_checkpoint, tmp_path / "refused.pt", backend=backend)
    deadline = time.monotonic() + 5  # a thread that was joined is listed for a moment longer

    def more():
        now = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        return now if now[0] > before[0] or now[1] > before[1] else None

    while after := more():  # fewer is fine: a thread of an earlier test may end meanwhile
        assert time.monotonic() < deadline, f"descriptors and threads: {before} before, {after} after"
        time.sleep(0.05)


@pytest.mark.parametrize("map_location", [None, "cpu", "meta", {"cpu": "cpu"}])
def test_ties_of_storages_without_data_are_those_of_torch(map_location, backend, tmp_path):
    """From 2.15 on tensors over one of them share it, also where they call it another dtype."""
    empty = torch.empty(0)
    obj = [empty, empty.view(0, 3), torch.empty(0), empty.view(torch.int32), torch.ones(3)[:0], torch.ones(3)]
    torch.save(obj, tmp_path / "model.pt")
    expected = torch.load(tmp_path / "model.pt", map_location=map_location)
    found = sio.load(tmp_path / "model.pt", map_location=map_location, backend=backend)
    assert storages_of(found) == storages_of(expected) and difference(expected, found) is None
