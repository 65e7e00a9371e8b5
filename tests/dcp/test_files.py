"""What many ranks write is what ``torch.save`` of the gathered state writes; any file of it is read by any ranks."""

import os

import pytest
import torch

import statedict_io as sio

from . import scenarios
from .ranks import all_well, run_ranks

LONG = pytest.mark.long


@pytest.fixture
def backends():
    return ["native", "torch"] if sio.backend_info().name == "native" else ["torch"]


@pytest.mark.parametrize(
    ("sharding", "world_size"),
    [
        ("replicated", 1),
        ("replicated", 3),
        ("fsdp", 2),
        ("fsdp", 3),
        ("column", 2),
        ("row", 3),
        ("mesh", 4),
        ("hybrid", 4),
        pytest.param("fsdp", 1, marks=LONG),
        pytest.param("fsdp", 4, marks=LONG),
        pytest.param("column", 3, marks=LONG),
        pytest.param("column", 4, marks=LONG),
        pytest.param("row", 2, marks=LONG),
        pytest.param("row", 4, marks=LONG),
        pytest.param("replicated", 2, marks=LONG),
        pytest.param("replicated", 4, marks=LONG),
    ],
)
def test_file_is_that_of_the_gathered_state(tmp_path, backends, sharding, world_size):
    written = all_well(run_ranks(world_size, scenarios.save_all, sharding, str(tmp_path), backends))
    expected = tmp_path / "expected"
    total = sum(len(content) for _, content in scenarios.storages(expected / "model.pt"))
    for index, backend in enumerate(backends):
        ours = tmp_path / backend
        assert sorted(os.listdir(ours)) == ["model.pt", "training.pt"]
        assert (ours / "model.pt").read_bytes() == (expected / "model.pt").read_bytes()
        assert scenarios.storages(ours / "training.pt") == scenarios.storages(expected / "training.pt")
        for options in ({}, {"mmap": True}):
            theirs = torch.load(expected / "training.pt", **options)
            assert scenarios.differences(theirs, torch.load(ours / "training.pt", **options)) == []
        loads = [of_rank[index] for of_rank in written]
        assert sum(loads) == total
        # 8 KiB: the largest part that is not cut.
        assert max(loads) <= 1.1 * total / world_size + (8 << 10), loads
    assert _output(tmp_path / backends[0] / "model.pt") == _output(expected / "model.pt")


def _output(path):
    model = scenarios.Net()
    model.load_state_dict(torch.load(path))
    return model(torch.linspace(0, 1, 66).reshape(2, 33)).tolist()


@pytest.mark.parametrize(
    ("world_size", "shardings"),
    [
        (1, ["replicated", "fsdp"]),
        (2, ["fsdp", "column", "row"]),
        (3, ["replicated", "fsdp", "row"]),
        (4, ["mesh", "hybrid", "column"]),
    ],
)
def test_each_rank_reads_its_part_of_any_file(tmp_path, backends, world_size, shardings):
    path = tmp_path / "stock.pt"
    torch.manual_seed(5)
    torch.save(scenarios.Net(width=257).state_dict(), path)
    for found in all_well(run_ranks(world_size, scenarios.load_all, shardings, str(path), backends)):
        for wrong, bytes_read, needed in found:
            assert wrong == []
            # The table alone, which every rank needs, is 140 kB; the structure and the directory some kB.
            assert needed <= bytes_read <= needed * 1.01 + (16 << 10)


def test_training_state_comes_back(tmp_path, backend):
    assert all_well(run_ranks(2, scenarios.load_training, "fsdp", str(tmp_path / "t.pt"), backend)) == [[], []]
