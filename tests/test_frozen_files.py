"""Files in the formats of older releases, kept as they are: see frozen/make.py."""

import pathlib

import pytest
import torch
from equality import difference

import statedict_io as sio

FROZEN = pathlib.Path(__file__).parent / "frozen"
ARCHIVES = ["torch_1_6.pt", "torch_2_1.pt", "big_endian.pt"]


def expected():
    base = torch.arange(1, 25, dtype=torch.int32).reshape(4, 6)
    half = torch.tensor([1, 2, 3, 4, 5, 6, 7], dtype=torch.bfloat16)
    return {
        "model": {"w": base, "t": base.t(), "h": half, "flags": torch.tensor([True, False])},
        "tied": [base, base[1:3, 2:]],
        "empty": torch.empty(0, 2),
        "p": torch.nn.Parameter(torch.tensor([0.5, -2.0])),
        "epoch": 7,
    }


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("name", [*ARCHIVES, "legacy.pt"])
def test_load(name, weights_only, backend):
    loaded = sio.load(FROZEN / name, weights_only=weights_only, backend=backend)
    assert difference(loaded, expected()) is None
    assert difference(loaded, torch.load(FROZEN / name, weights_only=weights_only)) is None
    assert loaded["tied"][1].untyped_storage()._cdata == loaded["model"]["t"].untyped_storage()._cdata


@pytest.mark.parametrize("name", ARCHIVES)
def test_verify_and_open(name, backend):
    assert sio.verify(FROZEN / name, backend=backend).ok
    assert difference(sio.load(FROZEN / name, verify=True, backend=backend), expected()) is None
    with sio.open_checkpoint(FROZEN / name, backend=backend) as checkpoint:
        assert list(checkpoint) == ["model.w", "model.t", "model.h", "model.flags", "tied.0", "tied.1", "empty", "p"]
        assert torch.equal(checkpoint["model.t"], expected()["model"]["t"])
        assert torch.equal(checkpoint["tied.1"], expected()["tied"][1])
        assert torch.equal(checkpoint.get_slice("model.h")[2:5], expected()["model"]["h"][2:5])
