"""One warning where a device is served by no _torch module. ../test_device.py runs this file too."""

import pathlib
import threading
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import require_native

import statedict_io as sio
from device_standin.checks import registered, small_tensors, standin  # noqa: F401 - fixtures
from statedict_io.backends import extension, slower
from statedict_io.backends.extension import ModuleInfo
from statedict_io.dcp import SingleFileWriter

DEVICE = "standin:0"
WAYS = {
    "save": lambda state, path: sio.save(state, path),
    "save_async": lambda state, path: sio.save_async(state, path).result(),
    "SingleFileWriter": lambda state, path: dcp.save(state, storage_writer=SingleFileWriter(path), no_dist=True),
}


@pytest.fixture(params=[True, False], ids=["with", "without"])
def torch_module(request, monkeypatch):
    """Whether a _torch module is in use, as far as the package knows."""
    require_native()
    monkeypatch.setattr(slower, "_told", threading.Lock())
    if request.param and not extension.find().torch_info.present:
        pytest.skip("no _torch module is installed for this torch")
    if not request.param:
        info = ModuleInfo(False, "no _torch module is installed for torch 9.9; to get one: do this")
        monkeypatch.setattr(extension, "_found", extension.find()._replace(torch_info=info, built_for_torch=None))
    return extension.find().torch_info.present


def warned_by(call, *arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments)
    return [warning for warning in caught if warning.category is sio.SlowerWarning]


@pytest.mark.parametrize("way", WAYS)
def test_saving_from_a_device_warns_once_where_no_module_serves_it(way, torch_module, tmp_path):
    on_host, on_device = (small_tensors(3, device, nbytes=1 << 16) for device in ("cpu", DEVICE))
    assert warned_by(WAYS[way], on_host, tmp_path / "host.pt") == []
    found = warned_by(WAYS[way], on_device, tmp_path / "device.pt")
    assert len(found) == (not torch_module)
    for warning in found:
        assert "9.9" in str(warning.message) and "do this" in str(warning.message)
        assert pathlib.Path(warning.filename) == pathlib.Path(__file__)
    for again in WAYS.values():
        assert warned_by(again, on_device, tmp_path / "again.pt") == []
    found = torch.load(tmp_path / "again.pt")
    assert all(found[name].cpu().equal(tensor) for name, tensor in on_host.items())


def test_loading_onto_a_device_warns_once_where_no_module_serves_it(torch_module, tmp_path):
    torch.save(small_tensors(3, "cpu"), tmp_path / "model.pt")
    assert warned_by(sio.load, tmp_path / "model.pt", "cpu") == []
    found = warned_by(sio.load, tmp_path / "model.pt", DEVICE)
    assert len(found) == (not torch_module)
    assert all(pathlib.Path(warning.filename) == pathlib.Path(__file__) for warning in found)
    assert warned_by(sio.load, tmp_path / "model.pt", DEVICE) == []
