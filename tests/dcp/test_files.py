"""What many ranks write is what ``torch.save`` of the gathered state writes."""

import os

import pytest
import torch

from . import scenarios
from .ranks import all_well, run_ranks

CASES = [
    ("replicated", 1),
    ("fsdp", 1),
    ("replicated", 3),
    ("fsdp", 2),
    ("fsdp", 3),
    ("fsdp", 4),
    ("column", 2),
    ("column", 3),
    ("row", 2),
    ("row", 3),
    ("mesh", 4),
    ("hybrid", 4),
]


@pytest.mark.parametrize(("sharding", "world_size"), CASES)
def test_file_is_that_of_the_gathered_state(tmp_path, backend, sharding, world_size):
    written = all_well(run_ranks(world_size, scenarios.save_all, sharding, str(tmp_path), backend))
    ours, theirs = tmp_path / "model.pt", tmp_path / "expected" / "model.pt"
    assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = tmp_path / "training.pt", tmp_path / "expected" / "training.pt"
    assert scenarios.storages(ours) == scenarios.storages(theirs)
    assert scenarios.differences(torch.load(theirs), torch.load(ours)) == []
    assert scenarios.differences(torch.load(theirs, mmap=True), torch.load(ours, mmap=True)) == []
    assert sorted(os.listdir(tmp_path)) == ["expected", "model.pt", "training.pt"]

    model = scenarios.Net()
    model.load_state_dict(torch.load(tmp_path / "model.pt"))
    gathered = scenarios.Net()
    gathered.load_state_dict(torch.load(tmp_path / "expected" / "model.pt"))
    x = torch.randn(2, 33, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), gathered(x))

    total = sum(content.__len__() for _, content in scenarios.storages(tmp_path / "model.pt"))
    assert sum(of_rank["model.pt"] for of_rank in written) == total
