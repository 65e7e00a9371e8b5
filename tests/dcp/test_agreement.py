"""Ranks that opened different versions of a file: what is chosen, how it is had, what they say where it cannot be."""

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan

import statedict_io as sio
from statedict_io.dcp import SingleFileReader, agreement
from statedict_io.reading.lazy.lazy_file import FileVersion

OLD, NEW = FileVersion(10, b"1", None), FileVersion(10, b"2", None)


def chosen(*opened):
    return [plan.storage_data for plan in agreement.with_choices([LoadPlan([], storage_data=each) for each in opened])]


def test_the_newest_version_is_chosen_and_where_it_is_open():
    ranks = [
        agreement.OpenedVersion(OLD, 1, "m", "/proc/1/fd/3"),
        agreement.OpenedVersion(NEW, 2, "m", "/proc/2/fd/3"),
        agreement.OpenedVersion(NEW, 2, "m", "/proc/3/fd/3"),
        agreement.OpenedVersion(NEW, 2, "n", "/proc/4/fd/3"),
        agreement.OpenedVersion(NEW, 2, "", "/proc/5/fd/3"),
    ]
    found = chosen(*ranks)
    assert {choice.version for choice in found} == {NEW}
    assert [choice.keeps_open for choice in found] == [False, True, False, True, False]
    assert found[0].descriptors == (("m", "/proc/2/fd/3"), ("n", "/proc/4/fd/3"))
    assert chosen(ranks[1], ranks[2]) == [agreement.Choice(NEW)] * 2


def test_a_planner_that_drops_it_is_named():
    with pytest.raises(ValueError, match="storage_data"):
        agreement.with_choices([LoadPlan([])])


@pytest.fixture
def ranks(backend, tmp_path):
    """ranks(versions): a reader for each, which opens the file while it has that value, and plans; then DCP's global
    step. Gives (reader, plan, planner, state) of each."""

    def opened(*versions, shapes=((3, 4),) * 9, path=tmp_path / "model.pt"):
        found = []
        for version, shape in zip(versions, shapes, strict=False):
            sio.save({"a": torch.full(shape, float(version)), "n": version}, path, backend=backend)
            reader, planner = SingleFileReader(path, backend=backend), DefaultLoadPlanner()
            reader.reset()
            state = {"a": torch.zeros(shape), "n": None}
            metadata = reader.read_metadata()
            planner.set_up_planner(state, metadata, is_coordinator=not found)
            reader.set_up_storage_reader(metadata, not found)
            found.append((reader, reader.prepare_local_plan(planner.create_local_plan()), planner, state))
        plans = found[0][0].prepare_global_plan([plan for _, plan, *_ in found])
        return [(reader, plan, planner, state) for (reader, _, planner, state), plan in zip(found, plans, strict=True)]

    return opened


def read(reader, plan, planner, state):
    reader.read_data(planner.finish_plan(plan), planner).wait()
    return state


def test_a_rank_that_was_early_reads_the_version_of_the_others(ranks, tmp_path):
    opened = ranks(1, 2)
    for each in opened:
        state = read(*each)
        assert state["a"].unique().tolist() == [2.0] and state["n"] == 2


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_also_when_it_is_under_no_name_any_more(ranks, tmp_path):
    opened = ranks(1, 2, 1)  # the last one's bytes are newer, and those of the first
    sio.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    states = [read(*each) for each in reversed(opened)]  # who holds it has to wait for the others
    assert [state["n"] for state in states] == [1, 1, 1]
    opened = ranks(1, 2)
    sio.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    assert [read(*each)["n"] for each in reversed(opened)] == [2, 2]


def test_else_it_says_so(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "_machine", lambda: "")  # as on another machine
    first, second = ranks(1, 2)
    sio.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(sio.StateDictIOError, match=r"model\.pt: it was replaced.*load it again"):
        read(*first)
    assert read(*second)["n"] == 2


def test_a_version_of_another_shape_is_refused(ranks):
    first, second = ranks(1, 2, shapes=((3, 4), (4, 3)))
    with pytest.raises(sio.StateDictIOError, match=r"other tensors.*'a'"):
        read(*first)
    assert read(*second)["n"] == 2


def test_versions_without_checksums_differ_by_their_time(tmp_path, backend):
    versions = []
    for compute in (False, True):
        for value in (1.0, 2.0):
            torch.serialization.set_crc32_options(compute)
            try:
                torch.save({"a": torch.full((5,), value)}, tmp_path / "model.pt")
            finally:
                torch.serialization.set_crc32_options(True)
            os.utime(tmp_path / "model.pt", ns=(0, 10**9 + int(value)))
            reader = SingleFileReader(tmp_path / "model.pt", backend=backend)
            reader.read_metadata()
            versions.append(reader.prepare_local_plan(LoadPlan([])).storage_data.version)
            reader.reset()
    without, with_checksums = versions[:2], versions[2:]
    assert [version.mtime_ns for version in without] == [10**9 + 1, 10**9 + 2]
    assert {version.serialization_id for version in without} == {None}
    assert [version.mtime_ns for version in with_checksums] == [None, None]
    assert len({version.serialization_id for version in with_checksums}) == 2


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts descriptors in /proc")
def test_no_descriptor_stays_open(tmp_path, backend):
    sio.save({"a": torch.ones(3)}, tmp_path / "model.pt")
    counts = []
    for _ in range(5):
        state = {"a": torch.zeros(3)}
        dcp.load(state, storage_reader=SingleFileReader(tmp_path / "model.pt", backend=backend), no_dist=True)
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[1:] == counts[:1] * 4
