"""All or nothing: whatever happens to one rank, all raise, the old file stands, and nothing is left behind."""

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import statedict_io as sio
from statedict_io.dcp import SingleFileReader, SingleFileWriter

from . import failing
from .ranks import KILLED, all_well, run_ranks

CASES = [
    (step, rank, fault) for step, ranks in failing.STEPS.items() for rank in ranks for fault in ("raise", "killed")
]
CASES += [("resolve", 0, "full disk"), ("resolve", 1, "full disk")]
# One of each kind in every run.
SHORT = {
    ("resolve", 1, "raise"),
    ("write", 1, "killed"),
    ("resolve", 1, "full disk"),
    ("written", 0, "killed"),
    ("commit", 0, "raise"),
    ("commit", 0, "killed"),
}


@pytest.mark.parametrize(
    ("step", "failing_rank", "fault"), [c if c in SHORT else pytest.param(*c, marks=pytest.mark.long) for c in CASES]
)
def test_all_ranks_raise_and_the_old_file_stands(tmp_path, backend, step, failing_rank, fault):
    path = tmp_path / "model.pt"
    torch.save("old", path)
    results = run_ranks(3, failing.save, str(tmp_path), backend, step, failing_rank, fault, group_seconds=8)
    for rank, result in enumerate(results):
        if fault == "killed" and rank == failing_rank:
            assert result == KILLED
            continue
        error, seconds, listing, cause = result
        assert error is not None, f"rank {rank} did not raise"
        assert seconds < 12
        if rank == 0:
            assert listing == ["model.pt"]
        if fault == "full disk":
            assert f"ranks:dict_keys([{failing_rank}])" in cause
            assert "File too large" in cause and "sdio-tmp" not in cause
    assert torch.load(path) == "old"
    if fault == "killed" and failing_rank == 0:  # nobody was there to clean up: a later save does
        for name in set(os.listdir(tmp_path)) - {"model.pt"}:
            os.utime(tmp_path / name, (0, 0))
        all_well(run_ranks(2, failing.save_well, str(path), backend))
        assert torch.load(path)["small"].tolist() == [3.0] * 7
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_kept_exception_keeps_no_temporary(tmp_path, backend):
    results = run_ranks(2, failing.save, str(tmp_path), backend, "written", 1, "killed", True, group_seconds=8)
    assert results[0][2] == []


def test_all_ranks_write_in_place(tmp_path, backend):
    """Into the file that is there, whatever its length; after an error that file is lost, and stays."""
    path, other = tmp_path / "model.pt", tmp_path / "other.pt"
    path.write_bytes(b"old" * (1 << 20))
    os.link(path, other)
    results = all_well(run_ranks(3, failing.save_in_place, str(path), backend))
    assert all("File too large" in cause for cause in results)
    assert path.samefile(other) and sorted(os.listdir(tmp_path)) == ["model.pt", "other.pt"]
    all_well(run_ranks(2, failing.save_well, str(path), backend))
    assert torch.load(path)["small"].tolist() == [3.0] * 7


def test_async_save_writes_the_state_at_the_call_and_tells_its_error(tmp_path, backend):
    path = tmp_path / "model.pt"
    errors = all_well(run_ranks(2, failing.save_async, str(path), backend))
    assert torch.load(path)["big"].unique().tolist() == [4.0]
    assert all("missing" in error for error in errors)
    assert os.listdir(tmp_path) == ["model.pt"]


def test_urls_of_stores_that_take_no_parts(tmp_path):
    """No rank can write its own bytes there; each can read its own."""
    pytest.importorskip("fsspec")
    url = "memory://user:secret@model/model.pt"
    with pytest.raises(CheckpointException) as raised:
        dcp.save({"a": torch.ones(3)}, storage_writer=SingleFileWriter(url), no_dist=True)
    assert "memory://user:***@model/model.pt" in str(raised.value) and "regular file" in str(raised.value)
    with pytest.raises(FileNotFoundError) as missing:
        SingleFileReader(url).read_metadata()
    assert missing.value.filename == "memory://user:***@model/model.pt"
    sio.save({"a": torch.ones(3)}, tmp_path / "model.pt")
    reader = SingleFileReader((tmp_path / "model.pt").as_uri())
    assert set(reader.read_metadata().state_dict_metadata) == {"a"}
    reader.reset()
