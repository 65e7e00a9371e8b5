"""weights_only: torch's restricted unpickler and its lists decide what may be loaded, also of abridged pickles."""

import contextlib
import pickle

import pytest
import torch
from corpus_case import filled
from equality import difference
from load_comparison import both
from oracle import attempt

import statedict_io as sio


class Marked(torch.Tensor):
    pass


class Settings:
    def __init__(self, value):
        self.value = value


class _Slotted:
    __slots__ = ("tensor",)


def plain(count=6):
    return {f"w{i}": filled(5, seed=i) for i in range(count)}


def subclassed():
    tensor = filled(4).as_subclass(Marked)
    tensor.note = "kept"
    return plain() | {"marked": tensor, "settings": Settings(filled(2))}


def test_allowed_globals_are_those_of_torch_at_the_time_of_the_call(backend, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(subclassed(), path)
    allowed = [Marked, Settings]
    _, refused = both(path, backend)
    assert isinstance(refused, pickle.UnpicklingError)
    with torch.serialization.safe_globals(allowed):
        loaded, refused = both(path, backend)
        assert refused is None and type(loaded["marked"]) is Marked and loaded["marked"].note == "kept"
    for missing in allowed:
        with torch.serialization.safe_globals([kind for kind in allowed if kind is not missing]):
            _, refused = both(path, backend)
            assert isinstance(refused, pickle.UnpicklingError)
    torch.serialization.add_safe_globals(allowed)
    try:
        assert both(path, backend)[1] is None
    finally:
        torch.serialization.clear_safe_globals()
    assert isinstance(both(path, backend)[1], pickle.UnpicklingError)


def test_allowed_globals_by_another_name(backend, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(plain() | {"settings": Settings(1)}, path)
    with torch.serialization.safe_globals([(_Slotted, f"{Settings.__module__}.Settings")]):
        both(path, backend)
    # What torch itself allows comes first, by its own names.
    called = []
    with torch.serialization.safe_globals([(lambda *_: called.append(1), "torch._utils._rebuild_tensor_v2")]):
        torch.save(plain(), path)
        assert both(path, backend)[1] is None
    assert called == []


def test_what_rebuilds_a_tensor_is_what_the_unpickler_allows(backend, tmp_path, monkeypatch):
    """Not what somebody has put in its place since: a shorter stream calls nothing that the long one does not."""
    torch.save(plain(), tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt")
    monkeypatch.setattr(torch._utils, "_rebuild_tensor_v2", None)
    loaded = sio.load(tmp_path / "model.pt", backend=backend)
    assert difference(loaded, plain()) is None


@pytest.mark.parametrize("computed", [False, True])
def test_offsets_of_tensors_without_data(computed, backend, tmp_path):
    """map_location="meta" leaves on each storage where its data are; torch may compute that or look it up."""
    from torch.utils.serialization import config

    torch.save(plain() | {"large": filled(1 << 15), "none": filled(0), "view": filled(9)[2:]}, tmp_path / "model.pt")
    before, config.load.calculate_storage_offsets = config.load.calculate_storage_offsets, computed
    try:
        expected = torch.load(tmp_path / "model.pt", map_location="meta")
        found = sio.load(tmp_path / "model.pt", map_location="meta", backend=backend)
    finally:
        config.load.calculate_storage_offsets = before
    if expected["w3"].untyped_storage()._checkpoint_offset is None:
        pytest.skip("this torch tells no offsets, as 2.9")
    data = (tmp_path / "model.pt").read_bytes()
    for name, tensor in found.items():
        offset = tensor.untyped_storage()._checkpoint_offset
        assert offset == expected[name].untyped_storage()._checkpoint_offset
    assert data[found["w3"].untyped_storage()._checkpoint_offset :].startswith(filled(5, seed=3).numpy().tobytes())


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = [lambda: torch.device("meta"), default_device, torch.inference_mode, torch.no_grad, default_dtype]


@pytest.mark.parametrize("mode", MODES, ids=["device", "default device", "inference", "no_grad", "default dtype"])
@pytest.mark.parametrize("map_location", [None, "cpu", "meta"])
def test_modes_in_which_somebody_loads(mode, map_location, backend, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(plain() | {"p": [torch.nn.Parameter(filled(3)) for _ in range(3)], "s": torch.eye(3).to_sparse()}, path)
    with mode():
        expected, error = attempt(torch.load, path, map_location=map_location)
        found, our_error = attempt(sio.load, path, map_location=map_location, backend=backend)
    # Some releases validate sparse tensors, and cannot where they are without data.
    assert (type(our_error), str(our_error)) == (type(error), str(error))
    if error is None:
        assert difference(expected, found) is None
        assert all(found[name].is_inference() == expected[name].is_inference() for name in plain())
