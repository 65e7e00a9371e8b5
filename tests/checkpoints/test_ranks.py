"""Many ranks: one file from all of them, one that keeps the directory, and the same step for all."""

import os

import pytest
import torch
from dcp.ranks import KILLED, all_well, run_ranks

import statedict_io as sio

from . import rank_scenarios


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dies", ["first", "last"])
def test_a_rank_that_dies_while_saving_and_all_resume_at_the_same_step(tmp_path, world_size, dies):
    path = str(tmp_path / "run")
    killed = 0 if dies == "first" else world_size - 1
    assert all_well(run_ranks(world_size, rank_scenarios.save_some, path, [1, 2, 3], None)) == [([1, 2, 3], None)] * (
        world_size
    )
    results = run_ranks(world_size, rank_scenarios.save_some, path, [4, 5], killed, group_seconds=8)
    for rank, result in enumerate(results):
        assert result == KILLED if rank == killed else result[0] == [4] and result[1] is not None
    found = all_well(run_ranks(world_size, rank_scenarios.resume, path))
    assert found == [(4, 4, [], True, False)] * world_size
    assert all_well(run_ranks(world_size, rank_scenarios.save_some, path, [5], None)) == [([5], None)] * world_size
    names = [f"step-{step:08d}.pt" for step in (4, 5)]
    assert sorted(os.listdir(path)) == sorted([*names, *(name + ".json" for name in names)])
    assert torch.load(f"{path}/{names[1]}")["name"] == "run of 5"
    assert [each.metric for each in sio.CheckpointDirectory(path)] == [0.4, 0.5]


def test_a_damaged_one_is_passed_over_by_all(tmp_path):
    path = str(tmp_path / "run")
    all_well(run_ranks(2, rank_scenarios.save_some, path, [1, 2], None))
    with open(f"{path}/step-00000002.pt", "r+b") as file:
        file.truncate(1000)
    found = all_well(run_ranks(2, rank_scenarios.resume, path))
    assert found == [(1, 1, [2], True, True), (1, 1, [2], True, False)]


def test_all_ranks_get_the_error_of_one(tmp_path):
    (tmp_path / "file").touch()
    first, second = all_well(run_ranks(2, rank_scenarios.fail_alike, str(tmp_path)))
    assert first == second == ["NotADirectoryError", "NotADirectoryError", "ValueError", "FileNotFoundError", None]


def test_without_a_process_group_there_is_one_rank(tmp_path):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    for step in (1, 2):
        ckpts.save(rank_scenarios.state_of(step), step, storage="dcp")
    assert ckpts.latest(storage="dcp").load()["name"] == "run of 2"
    assert ckpts.restore(storage="dcp") == 2
    with open(tmp_path / "step-00000002.pt", "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(200))
    with pytest.raises(sio.CorruptCheckpointError):
        ckpts.restore(storage="dcp", step=2)
    ckpts.save(rank_scenarios.state_of(2), 2, storage="dcp", digest="sha256")
    assert ckpts.restore(storage="dcp", verify="digest") == 2
    with pytest.raises(ValueError, match="storage"):
        ckpts.save({}, 3, storage="s3")
    with pytest.raises(ValueError, match="save_async"):
        ckpts.save_async({}, 3, storage="dcp")
