"""Many ranks, one object: the bytes of the file, from every rank its part; all or nothing, whatever fails."""

import sys

import fsspec.config
import pytest
import torch
import torch.distributed.checkpoint as dcp
from remote.conftest import content, keys, s3, s3_session, small_parts, uploads  # noqa: F401
from remote.s3_server import drop, error
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import statedict_io as sio
from statedict_io.dcp import SingleFileWriter
from statedict_io.dcp.conversion import dcp_to_file

from . import scenarios, storing
from .ranks import KILLED, all_well, run_ranks

LONG = pytest.mark.long
KEY = "model.pt"
URL = storing.URL

pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.fixture
def options(s3):  # noqa: F811
    return dict(fsspec.config.conf["s3"])


@pytest.mark.parametrize(
    ("sharding", "world_size"),
    [
        ("replicated", 1),
        ("replicated", 2),
        ("fsdp", 2),
        ("mesh", 4),
        pytest.param("column", 3, marks=LONG),
        pytest.param("row", 4, marks=LONG),
        pytest.param("hybrid", 4, marks=LONG),
    ],
)
def test_the_object_is_the_file(sharding, world_size, s3, options, tmp_path):  # noqa: F811
    found = all_well(run_ranks(world_size, storing.save_all, options, sharding, str(tmp_path)))
    for name in ("model.pt", "training.pt", "tiny.pt", "mixed.pt"):
        assert content(s3, name) == (tmp_path / name).read_bytes()
    for told, nbytes in found:
        assert told[-1][0] == told[-1][1] and nbytes > 0
    assert uploads(s3) == []
    of_model = [request for request in s3.requests if request.path.endswith("/model.pt")]
    kinds = [request.kind for request in of_model]
    assert kinds.count("create") == kinds.count("complete") == 2
    parts = [request.part for request in of_model if request.kind == "part"]
    assert len(parts) == 2 * len(set(parts)) >= 8
    assert "put" in [request.kind for request in s3.requests if request.path.endswith("/tiny.pt")]
    assert sio.verify(URL).ok


def failed(results, rank=None):
    """None of the ranks that live may have succeeded."""
    for each, result in enumerate(results):
        assert result == KILLED if each == rank else "CheckpointException" in result or "Error" in result, result
    return " ".join(result for result in results if result != KILLED)


def old_object(server):
    sio.save({"old": 1}, URL)
    server.reset()
    return content(server, KEY)


CASES = [
    (step, rank, fault)
    for step in ("resolve", "before its parts", "amid its parts", "after its parts")
    for rank in (0, 1, 2)
    for fault in ("raise", "killed")
]
CASES += [(step, 0, fault) for step in ("global plan", "end", "completion") for fault in ("raise", "killed")]
SHORT = {
    ("resolve", 1, "raise"),
    ("before its parts", 1, "raise"),
    ("before its parts", 1, "killed"),
    ("amid its parts", 2, "killed"),
    ("amid its parts", 0, "killed"),
    ("completion", 0, "killed"),
}


@pytest.mark.parametrize(
    ("step", "failing_rank", "fault"), [c if c in SHORT else pytest.param(*c, marks=LONG) for c in CASES]
)
def test_all_raise_and_the_old_object_stands(s3, options, step, failing_rank, fault):  # noqa: F811
    old = old_object(s3)
    results = run_ranks(3, storing.save_failing, options, step, failing_rank, fault, group_seconds=8)
    causes = failed(results, failing_rank if fault == "killed" else None)
    if fault == "raise":
        assert "this rank fails" in causes
    assert content(s3, KEY) == old and keys(s3) == [KEY]
    assert uploads(s3) == []


#: name -> (request, fault, how often), and what its error says
FAULTS = {
    "once.pt": ([("part", 3, error(503, "SlowDown"), 1), ("part", 5, drop, 1)], None),
    "part.pt": ([("part", 4, error(403, "AccessDenied", "no parts here"), 1 << 30)], "no parts here"),
    "completion.pt": ([("complete", None, error(400, "InvalidPart", "no end here"), 1 << 30)], "no end here"),
    "beginning.pt": ([("create", None, error(404, "NoSuchBucket", "no bucket here"), 1 << 30)], "FileNotFoundError"),
    "kept.pt": (
        [
            ("complete", None, error(400, "InvalidPart"), 1 << 30),
            ("abort", None, error(403, "AccessDenied", "no aborting here"), 1 << 30),
        ],
        "no aborting here",
    ),
    "afterwards.pt": ([], None),
}


def test_what_the_store_refuses_all_ranks_raise(s3, options):  # noqa: F811
    """Or is sent again, where it may have been bad luck. All in one job, each under its own name."""
    old = old_object(s3)
    for name, (faults, _) in FAULTS.items():
        s3.client.put_object(Bucket=storing.BUCKET, Key=name, Body=old)
        for kind, part, fault, times in faults:
            s3.fail(is_request(name, kind, part), fault, times)
    results = all_well(run_ranks(2, storing.save, options, tuple(FAULTS)))
    for index, (name, (_, text)) in enumerate(FAULTS.items()):
        told = [of_rank[index] for of_rank in results]
        if text is None:
            assert told == [None, None]
            assert sio.verify(f"s3://{storing.BUCKET}/{name}").ok and content(s3, name) != old
        else:
            assert all(text in error for error in told), told
            assert content(s3, name) == old
    assert [upload["Key"] for upload in uploads(s3)] == ["kept.pt"]


def is_request(name, kind, part):
    return lambda request: request.path.endswith(f"/{name}") and request.kind == kind and part in (None, request.part)


def test_wrong_credentials_in_one_rank(s3, options):  # noqa: F811
    old = old_object(s3)
    causes = failed(run_ranks(3, storing.save_with, [options, options, {**options, "key": "another"}]))
    assert "PermissionError" in causes and URL in causes
    assert content(s3, KEY) == old and uploads(s3) == []


def test_overwrite_false(s3, options):  # noqa: F811
    assert "FileExistsError" in failed(run_ranks(2, storing.save_once_more, options))
    assert content(s3, KEY) == b"theirs"
    assert uploads(s3) == []
    s3.reset()
    ((result,),) = run_ranks(1, storing.save, options, (KEY,), False)
    assert "FileExistsError" in result and "overwrite=False" in result
    assert "create" not in s3.kinds() and content(s3, KEY) == b"theirs"


def test_async_save(s3, options, tmp_path):  # noqa: F811
    results = run_ranks(2, storing.save_async, options, str(tmp_path / KEY))
    assert all("PermissionError" in result for result in results)
    expected = torch.load(tmp_path / KEY)
    assert scenarios.differences(expected, sio.load(URL)) == []
    assert uploads(s3) == []


@LONG
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is Linux's to tell")
def test_memory_is_that_of_the_parts_under_way(s3, options):  # noqa: F811
    """Two of 8 MiB, and 64 MiB; a rank has 96 MiB of the state."""
    options = {**options, "max_concurrency": 2, "default_block_size": 8 << 20}
    grown = all_well(run_ranks(2, storing.peak_of_save, options, 192 << 20))
    assert max(grown) <= (2 * 8 + 64) << 20, grown


def test_one_process_needs_no_group(s3, tmp_path):  # noqa: F811
    """``no_dist``, a directory of checkpoints, and a directory of DCP's that becomes an object."""
    state = {"w": torch.arange(70_000.0), "note": "kept"}
    dcp.save(state, storage_writer=SingleFileWriter(tmp_path / KEY), no_dist=True)
    dcp.save(state, storage_writer=SingleFileWriter(URL), no_dist=True)
    assert content(s3, KEY) == (tmp_path / KEY).read_bytes()
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    dcp_to_file(tmp_path / "dcp", f"s3://{storing.BUCKET}/runs/model.pt")
    assert content(s3, "runs/model.pt") == content(s3, KEY)
    directory = sio.CheckpointDirectory(f"s3://{storing.BUCKET}/steps", keep_last=1)
    for step in (1, 2):
        directory.save({**state, "step": step}, step, storage="dcp")
    assert [(each.step, each.load()["step"]) for each in directory] == [(2, 2)]
    assert uploads(s3) == []


def test_the_sum_of_the_object_that_is_replaced_goes_with_it(s3):  # noqa: F811
    sio.save({"old": 1}, URL, digest="sha256")
    assert sorted(keys(s3)) == [KEY, f"{KEY}.sha256"]
    dcp.save({"w": torch.arange(70_000.0)}, storage_writer=SingleFileWriter(URL), no_dist=True)
    assert keys(s3) == [KEY]


def test_a_store_that_wants_parts_of_one_size_is_refused(s3, options, monkeypatch):  # noqa: F811
    """As s3fs is told of Cloudflare's."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {**options, "fixed_upload_size": True})
    with pytest.raises(CheckpointException, match="parts of one size"):
        dcp.save({"w": torch.arange(70_000.0)}, storage_writer=SingleFileWriter(URL), no_dist=True)
    assert s3.kinds() == []


@pytest.mark.parametrize("fails", ["w", "note"])
def test_a_planner_that_fails_leaves_no_upload(s3, fails):  # noqa: F811
    """At once, where there is nobody else to be told of it."""

    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item):
            if write_item.index.fqn == fails:
                raise RuntimeError("nothing of that")
            return super().resolve_data(write_item)

    state = {"w": torch.arange(70_000.0), "note": "kept"}
    with pytest.raises(CheckpointException, match="nothing of that"):
        dcp.save(state, storage_writer=SingleFileWriter(URL), planner=Planner(), no_dist=True)
    assert "create" in s3.kinds() and uploads(s3) == [] and keys(s3) == []
