"""Loading onto a device whose copies finish late. ../test_device.py runs this file, in a process of its own."""

import pytest
import torch
from oracle import attempt

import statedict_io as sio
from device_standin.checks import LATE_US, MIB, random_bytes, registered, standin  # noqa: F401 - fixtures
from statedict_io import readahead


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(readahead, "WINDOW_NBYTES", MIB)


def state():
    """More than one window, ties and views, and small tensors between large ones."""
    base = random_bytes(MIB, 1)
    parts = {f"large{i}": random_bytes(MIB // 2 + i, 2 + i) for i in range(3)}
    small = {f"w{i}": random_bytes(1000 + i, 10 + i) for i in range(50)}
    return {
        "base": base,
        "view": base[7:],
        **parts,
        **small,
        "none": torch.empty(0),
        "p": torch.nn.Parameter(torch.ones(3)),
    }


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].device == tensor.device and type(found[name]) is type(tensor), name
        assert torch.equal(found[name].cpu(), tensor.cpu()), name


FORMS = {
    "name": "standin:1",
    "device": torch.device("cpu"),
    "dict": {"cpu": "standin:0"},
    "callable": lambda storage, _: storage.cpu() if storage.nbytes() < 2000 else storage.to("standin:0"),
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_the_host_onto_a_device(form, verify, backend, tmp_path, standin):  # noqa: F811
    torch.save(state(), tmp_path / "model.pt")
    standin.delay_us = LATE_US
    expected, refused = attempt(torch.load, tmp_path / "model.pt", map_location=FORMS[form])
    found, error = attempt(sio.load, tmp_path / "model.pt", FORMS[form], verify=verify, backend=backend)
    assert type(error) is type(refused), repr(error)
    if refused is None:
        assert_equal(found, expected)
        if form != "callable":
            assert found["view"].untyped_storage().data_ptr() == found["base"].untyped_storage().data_ptr()


@pytest.mark.parametrize("map_location", [None, "cpu", {"standin:1": "standin:0"}], ids=str)
def test_tensors_of_a_device_to_where_they_were_or_elsewhere(map_location, backend, tmp_path, standin):  # noqa: F811
    tensors = {name: tensor.detach().to("standin:1") for name, tensor in state().items() if name != "view"}
    torch.save(tensors, tmp_path / "model.pt")
    standin.delay_us = LATE_US
    expected = torch.load(tmp_path / "model.pt", map_location=map_location)
    assert_equal(sio.load(tmp_path / "model.pt", map_location, backend=backend), expected)
