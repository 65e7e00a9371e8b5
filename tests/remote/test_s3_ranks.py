"""Ranks that read one object of S3, each its part."""

import errno

import fsspec.config
import pytest
import torch
import torch.distributed.checkpoint as dcp
from corpus_case import filled
from dcp import scenarios
from dcp.ranks import all_well, run_ranks
from equality import difference
from torch.distributed.checkpoint.api import CheckpointException

import statedict_io as sio
from remote.conftest import BUCKET
from statedict_io.dcp import SingleFileReader

pytest.importorskip("fsspec")
URL = f"s3://{BUCKET}/model.pt"


def test_each_rank_reads_its_part(s3):
    sio.save(scenarios.build("replicated", 1, seed=5, width=257).state_dict(), URL)
    s3.reset()
    options = fsspec.config.conf["s3"]
    for wrong, bytes_read, needed in all_well(run_ranks(2, scenarios.load_from_store, "fsdp", URL, options)):
        assert wrong == []
        assert needed <= bytes_read <= needed * 1.01 + (16 << 10)
    # Of each rank: the two that open it; all that is small lies together.
    assert len(s3.requests) <= 2 * 4


def test_many_reads_are_gathered(s3):
    """Rows of matrices, columns of others, small tensors between them, in one process: the plan of a rank."""
    state = {}
    for layer in range(20):
        state[f"{layer}.rows"] = filled(64, 2048, dtype=torch.int32, seed=layer)
        state[f"{layer}.bias"] = filled(64, dtype=torch.int32, seed=layer)
        state[f"{layer}.columns"] = filled(64, 256, dtype=torch.int32, seed=layer)
    sio.save(state, URL)
    s3.reset()
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(found, storage_reader=SingleFileReader(URL), no_dist=True)
    assert difference(found, state) is None
    assert s3.kinds() == ["get"] * len(s3.requests) and len(s3.requests) <= 2 + 16
    s3.reset()
    found = {name: torch.zeros_like(tensor).t() for name, tensor in state.items() if name.endswith("columns")}
    expected = {name: state[name] for name in found}
    sio.save({name: tensor.t() for name, tensor in state.items()}, URL)
    s3.reset()
    dcp.load(found, storage_reader=SingleFileReader(URL), no_dist=True)
    assert all(torch.equal(found[name].t(), expected[name]) for name in found)
    assert len(s3.requests) <= 2 + 2 * 20


def test_an_object_that_is_replaced_before_it_is_read(s3):
    state = {"w": filled(300_000)}
    sio.save(state, URL)

    class Late(SingleFileReader):
        def read_data(self, plan, planner):
            sio.save({"w": filled(300_000, seed=1)}, URL)
            return super().read_data(plan, planner)

    with pytest.raises(CheckpointException) as caught:
        dcp.load({"w": torch.zeros(300_000)}, storage_reader=Late(URL), no_dist=True)
    error = caught.value.failures[0][0]
    assert isinstance(error, OSError) and (error.errno, error.filename) == (errno.ESTALE, URL)


def test_versions_are_told_from_each_other(s3):
    """By the store, whatever is in them."""
    versions = []
    for seed in (0, 1):
        sio.save({"w": filled(1000, seed=seed)}, URL)
        for _ in range(2):
            reader = SingleFileReader(URL)
            reader.read_metadata()
            versions.append(reader._opened().file.version)
            reader.reset()
    assert versions[0] == versions[1] != versions[2] == versions[3] and versions[0].store_version
