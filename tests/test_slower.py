"""What runs is never silently slower than what was installed for: one warning a process, before anything is written."""

import dataclasses
import pathlib
import threading
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import require_native
from oracle import names_in

import statedict_io as sio
from statedict_io import dcp as sio_dcp
from statedict_io.backends import extension, native, reproduction, slower
from statedict_io.backends.extension import Extension, ModuleInfo
from statedict_io.installed.proofs import Verdict
from statedict_io.pickles import pickling
from statedict_io.reading import load_steps, loading

FAILED = Verdict(False, problem="it is different")
UNTRIED = Verdict(False, "MemoryError: none left")
WITHOUT = ModuleInfo(False, "there is none")


def found(monkeypatch, **changes):
    """What there is of compiled code, for one test."""
    monkeypatch.setattr(extension, "_found", extension.find()._replace(**changes))


@pytest.fixture(autouse=True)
def nobody_was_told(monkeypatch):
    monkeypatch.setattr(slower, "_told", threading.Lock())


@pytest.fixture
def unloadable(monkeypatch):
    """A file of _core is there, and is not in use."""
    info = ModuleInfo(False, "_core cannot be loaded: it is damaged; to install it again: do this")
    found(monkeypatch, core=None, core_info=info, torch_info=WITHOUT, built_for_torch=None, is_installed=True)
    return "it is damaged.*do this"


@pytest.fixture
def no_torch_module(monkeypatch):
    require_native()
    info = ModuleInfo(False, "no _torch module is installed for torch 9.9; to get a newer release: do this")
    found(monkeypatch, torch_info=info, built_for_torch=None)
    return "9.9.*do this"


def state():
    return {"w": torch.arange(1000.0), "step": 1}


def save_shards(path, **options):
    dcp.save(state(), storage_writer=sio_dcp.SingleFileWriter(path, **options), no_dist=True)


def load_shards(path, **options):
    dcp.load(state(), storage_reader=sio_dcp.SingleFileReader(path, **options), no_dist=True)


def save_patched(path, **options):
    with sio.patch_torch(**options):
        torch.save(state(), path)


SAVES = {
    "save": lambda path, **options: sio.save(state(), path, **options),
    "fastsave": lambda path, **options: sio.fastsave(state(), path, **options),
    "save_async": lambda path, **options: sio.save_async(state(), path, **options).result(),
    "patch_torch": save_patched,
    "SingleFileWriter": save_shards,
}
LOADS = {
    "load": sio.load,
    "open_checkpoint": lambda path, **options: sio.open_checkpoint(path, **options).close(),
    "verify": sio.verify,
    "SingleFileReader": load_shards,
}


@pytest.fixture
def path(tmp_path):
    """Of a file that is there."""
    path = tmp_path / "model.pt"
    torch.save(state(), path)
    return path


def warned_by(call, *arguments, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments, **options)
    return [warning for warning in caught if warning.category is sio.SlowerWarning]


@pytest.mark.parametrize("way", [*SAVES, *LOADS])
def test_each_way_in_warns_once_a_process_and_points_at_its_caller(way, unloadable, path):
    call = {**SAVES, **LOADS}[way]
    with pytest.warns(sio.SlowerWarning, match=f"(?s){unloadable}") as caught:
        call(path)
    (warning,) = [each for each in caught if each.category is sio.SlowerWarning]
    assert pathlib.Path(warning.filename) == pathlib.Path(__file__)
    for again in {**SAVES, **LOADS}.values():
        assert warned_by(again, path) == []


@pytest.mark.parametrize("spelling", ["python", "torch"])
@pytest.mark.parametrize("way", [*SAVES, *LOADS])
def test_who_asks_for_the_python_backend_is_not_told(way, spelling, unloadable, path):
    call = {**SAVES, **LOADS}[way]
    assert warned_by(call, path, backend=spelling) == []
    assert len(warned_by(call, path)) == 1  # it has not been used up


@pytest.mark.parametrize("way", [*SAVES, *LOADS])
def test_an_installation_without_compiled_code_warns_of_nothing(way, monkeypatch, path):
    found(monkeypatch, core=None, core_info=WITHOUT, torch_info=WITHOUT, built_for_torch=None, is_installed=False)
    assert warned_by({**SAVES, **LOADS}[way], path) == []


@pytest.mark.parametrize("way", [*SAVES, *LOADS])
def test_what_was_installed_for_warns_of_nothing(way, path):
    assert warned_by({**SAVES, **LOADS}[way], path) == []


@pytest.mark.parametrize("way", [*SAVES])
def test_a_warning_that_is_an_error_leaves_the_old_file_and_does_not_come_again(way, unloadable, path):
    old = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error", sio.SlowerWarning)
        with pytest.raises((sio.SlowerWarning, dcp.api.CheckpointException), match="it is damaged"):
            SAVES[way](path)
        assert path.read_bytes() == old
        assert names_in(path.parent) == ["model.pt"]
        path.unlink()
        SAVES[way](path)
    assert torch.load(path)["w"].equal(state()["w"])
    assert names_in(path.parent) == ["model.pt"]


@pytest.mark.parametrize("way", [*LOADS])
def test_a_warning_that_is_an_error_stops_one_load_only(way, unloadable, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", sio.SlowerWarning)
        with pytest.raises((sio.SlowerWarning, dcp.api.CheckpointException), match="it is damaged"):
            LOADS[way](path)
        LOADS[way](path)


@pytest.mark.parametrize("verdict", [FAILED, UNTRIED], ids=["failed", "untried"])
@pytest.mark.parametrize("way", ["save", "save_async", "patch_torch"])
def test_a_proof_of_the_format_that_does_not_hold(way, verdict, monkeypatch, path):
    monkeypatch.setattr(reproduction, "reproduced_by", lambda backend: verdict)
    (warning,) = warned_by(SAVES[way], path)
    assert "'format'" in str(warning.message)
    assert ("pip install" in str(warning.message)) == (verdict is FAILED)
    assert torch.load(path)["step"] == 1


def test_a_proof_of_the_format_that_holds_without_compiled_code_only(monkeypatch, path):
    require_native()
    monkeypatch.setattr(
        reproduction, "reproduced_by", lambda backend: FAILED if backend.name == "native" else Verdict(True)
    )
    (warning,) = warned_by(SAVES["save"], path)
    assert "'format'" in str(warning.message)


def test_a_proof_of_the_reduction_that_failed(monkeypatch, path):
    require_native()
    monkeypatch.setattr(pickling.reduces_like_torch, "_verdicts", {(extension.find().core,): FAILED})
    (warning,) = warned_by(SAVES["save"], path)
    assert "'reduction'" in str(warning.message) and "it is different" in str(warning.message)
    assert sio.backend_info().proofs["reduction"].status == "failed"
    assert torch.load(path)["step"] == 1


@pytest.mark.parametrize("verdict", [FAILED, UNTRIED], ids=["failed", "untried"])
def test_a_proof_of_loading_that_does_not_hold(verdict, monkeypatch, path):
    monkeypatch.setattr(loading, "loads_like_torch", lambda lean_pickle: verdict)
    (warning,) = warned_by(sio.load, path)
    assert "'loading'" in str(warning.message)
    assert warned_by(sio.load, path) == []


def test_saving_from_a_device_that_no_torch_module_serves(monkeypatch, no_torch_module, path):
    assert warned_by(SAVES["save"], path) == []  # on the host nothing is slower
    monkeypatch.setattr(native.NativeFile, "device_nbytes", {"cuda:0": 4000})
    (warning,) = warned_by(SAVES["save"], path)
    assert "9.9" in str(warning.message) and "do this" in str(warning.message)


def test_loading_onto_a_device_that_no_torch_module_serves(monkeypatch, no_torch_module, path):
    assert warned_by(sio.load, path) == []
    asked = []
    monkeypatch.setattr(load_steps, "only_device", lambda *_: asked.append(torch.device("cuda:0")) or asked[-1])
    monkeypatch.setattr(load_steps, "ReadAhead", _Nothing)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(_Reached):
        warnings.simplefilter("always")
        sio.load(path, "cuda:0")
    (warning,) = [each for each in caught if each.category is sio.SlowerWarning]
    assert "9.9" in str(warning.message) and pathlib.Path(warning.filename) == pathlib.Path(__file__)


class _Reached(Exception):
    pass


class _Nothing:
    def __init__(self, *_, device, **__):
        assert device == torch.device("cuda:0")
        raise _Reached


def test_a_device_is_no_reason_where_nothing_compiled_is_installed(monkeypatch, path):
    found(monkeypatch, core=None, core_info=WITHOUT, torch_info=WITHOUT, built_for_torch=None, is_installed=False)
    monkeypatch.setattr(load_steps, "only_device", lambda *_: torch.device("cuda:0"))
    monkeypatch.setattr(load_steps, "ReadAhead", _Nothing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(_Reached):
            sio.load(path, "cuda:0")


def test_what_is_found_is_described_without_raising(unloadable):
    info = sio.backend_info()
    assert (info.name, info.built_for_torch, info.simd) == ("python", None, None)
    assert not info.core and not info.torch_module
    assert isinstance(hash(info), int)
    assert {field.name for field in dataclasses.fields(info)} >= {"core", "torch_module", "proofs"}
    assert "it is damaged" in info.reason and "it is damaged" in str(info)


def test_the_category_is_a_user_warning():
    assert issubclass(sio.SlowerWarning, UserWarning)
    assert isinstance(extension.find(), Extension)
