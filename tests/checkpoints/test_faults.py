"""Every system call of a save into a directory, and of a search, failing once and for good."""

import errno
import json
import os

import pytest
from conftest import require_native
from faults.preload import run_module

import statedict_io as sio
from statedict_io.checkpoints import local_folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", ["quick", pytest.param("exhaustive", marks=pytest.mark.long)])
def test_every_call_failing_in_every_way(size, backend, preload, tmp_path, report_counts):
    if backend == "native":
        require_native()
    printed = run_module(preload, "checkpoints.faults_process", tmp_path, backend, size, timeout=850)
    *failures, summary = printed.splitlines()
    counts = json.loads(summary)
    report_counts(f"directory, {backend}: {counts['faults']} calls made to fail, {len(failures)} failures")
    assert failures == [], "\n".join(failures[:40])
    assert counts["faults"] > 500 and counts["not met"] < counts["faults"] / 20
    assert counts["save refused"] > 100 and counts["search refused"] > 20
    for call in ("flock", "symlink", "unlink", "rename", "renameat", "opendir", "readdir"):
        assert counts[f"save: {call}"] > 0, call


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ELOOP, errno.EINVAL])
def test_where_nothing_can_be_read_there_is_no_answer(number, tmp_path, state, monkeypatch):
    """None would mean that the run begins anew."""
    ckpts = sio.CheckpointDirectory(tmp_path)
    for step in (1, 2, 3):
        ckpts.save(state(step), step)
    refused = {"step-00000002.pt", "step-00000003.pt"}
    real = os.open

    def fails(path, *arguments, **options):
        if os.path.basename(path) in refused:
            raise OSError(number, os.strerror(number), path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fails)
    with pytest.warns(sio.CheckpointDirectoryWarning, match=os.strerror(number)):
        assert [each.step for each in ckpts.latest().skipped] == [3, 2]
    refused.add("step-00000001.pt")
    for search in (ckpts.latest, ckpts.restore):
        with pytest.raises(OSError) as raised:
            search()
        assert raised.value.errno == number
    monkeypatch.undo()
    assert ckpts.latest().step == 3


@pytest.mark.parametrize("way", ["sync", "async"])
def test_facts_that_do_not_reach_the_disk(way, tmp_path, state, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    ckpts = sio.CheckpointDirectory(tmp_path)
    monkeypatch.setattr(local_folder.LocalFolder, "sync", fails)
    with pytest.warns(sio.CheckpointDirectoryWarning, match="power loss"):
        ckpts.save(state(1), 1, 0.5) if way == "sync" else ckpts.save_async(state(1), 1, 0.5).result()
        ckpts.wait()
    assert ckpts.latest().metric == 0.5
    ckpts.save(state(2), 2, durable=False)
