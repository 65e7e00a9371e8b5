"""Saving: what is in the directory, in which order it comes and goes, and what a failure leaves."""

import errno
import json
import math
import os
import pathlib
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from oracle import assert_same_bytes

import statedict_io as sio
from statedict_io.__main__ import main
from statedict_io.checkpoints import background, deletion, links, local_folder, writer
from statedict_io.system import locks
from statedict_io.system.file_digest import FileDigest


def files(path):
    return sorted(entry.name for entry in pathlib.Path(path).iterdir() if entry.name != ".statedict-io.lock")


def save(ckpts, state, step, metric=None, *, way="sync", **options):
    if way == "sync":
        ckpts.save(state, step, metric, **options)
    else:
        ckpts.save_async(state, step, metric, **options).result()
        ckpts.wait()


@pytest.fixture(params=["sync", "async"])
def way(request):
    return request.param


def test_files_are_those_of_torch_save_and_rules_are_kept(tmp_path, backend, way, state):
    ckpts = sio.CheckpointDirectory(tmp_path / "a" / "b", keep_last=2, keep_every=4, keep_best=1, best="max")
    for step, metric in enumerate([0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6], start=1):
        save(ckpts, state(step), step, metric, way=way, backend=backend)
    names = [f"step-{step:08d}.pt" for step in (2, 4, 6, 7)]
    assert files(ckpts.path) == sorted([*names, *(name + ".json" for name in names)])
    (tmp_path / "torch").mkdir()
    for name in names:
        torch.save(state(int(name[5:13])), tmp_path / "torch" / name)
        assert_same_bytes(tmp_path / "torch" / name, pathlib.Path(ckpts.path, name))
    assert [(found.step, found.metric) for found in ckpts] == [(2, 0.9), (4, 0.3), (6, 0.5), (7, 0.6)]
    assert ckpts.latest().step == 7 and ckpts.best().step == 2


def test_nothing_is_made_before_the_first_save(tmp_path):
    ckpts = sio.CheckpointDirectory(tmp_path / "runs", keep_last=1, best="min")
    assert ckpts.latest() is ckpts.best() is ckpts.restore() is None
    assert list(ckpts) == []
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "metric",
    [None, math.nan, math.inf, -math.inf, 0.1, -3, np.float32(2), torch.tensor([2.5], requires_grad=True), 10**400],
    ids=lambda metric: str(metric)[:12],
)
def test_metrics_of_every_kind(metric, tmp_path, way):
    ckpts = sio.CheckpointDirectory(tmp_path, best="min")
    if isinstance(metric, int) and metric > 0:
        with pytest.raises(ValueError, match="metric must be a number"):
            save(ckpts, {}, 1, metric, way=way)
        assert files(tmp_path) == []
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of numbers out of tensors that require a gradient
        save(ckpts, {}, 1, metric, way=way)
    (found,) = ckpts
    assert repr(found.metric) == repr(metric if metric is None else 2.5 if torch.is_tensor(metric) else float(metric))
    json.loads(pathlib.Path(found.path + ".json").read_text(), parse_constant=pytest.fail)  # JSON that all can read
    assert (ckpts.best() is None) == (found.metric is None or math.isnan(found.metric))


@pytest.mark.parametrize("metric", ["good", [1.0], torch.ones(2), torch.ones(1, device="meta"), 1j])
def test_metrics_that_are_none(metric, tmp_path):
    with pytest.raises((TypeError, ValueError), match="metric must be a number"):
        sio.CheckpointDirectory(tmp_path / "runs").save({}, 1, metric)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "option",
    [
        *({name: value} for name in ("keep_last", "keep_every") for value in (2.5, "2", [2])),
        {"keep_best": 1.5, "best": "min"},
        {"best": 1},
        {"links": "yes"},
        {"allow_other_writers": None},
    ],
    ids=str,
)
def test_options_of_a_wrong_type_are_named_before_anything_is_saved(option, tmp_path):
    with pytest.raises(TypeError, match=f"^{next(iter(option))} must be"):
        sio.CheckpointDirectory(tmp_path, **option)


def test_what_is_known_of_a_checkpoint(tmp_path, backend, way, state):
    import hashlib
    import time

    ckpts = sio.CheckpointDirectory(tmp_path)
    before = time.time()
    save(ckpts, state(1), 1, way=way, digest="sha256", backend=backend)
    save(ckpts, state(2), 2, way=way, backend=backend)
    first, second = ckpts
    assert before <= first.time <= time.time() and first.wall_clock[:4].isdecimal()
    assert first.sha256 == hashlib.sha256(pathlib.Path(first.path).read_bytes()).hexdigest()
    assert second.sha256 is second.metric is None
    with pytest.raises(ValueError, match="digest"):
        ckpts.save(state(3), 3, digest="md5")


def test_a_step_saved_twice_is_replaced(tmp_path, way, state):
    ckpts = sio.CheckpointDirectory(tmp_path, best="min", keep_best=1)
    save(ckpts, state(1), 1, 0.1, way=way)
    save(ckpts, {"step": 1, "again": True}, 1, 0.7, way=way)
    (found,) = ckpts
    assert found.load() == {"step": 1, "again": True} and found.metric == 0.7
    save(ckpts, state(2), 2, 0.5, way=way)
    assert ckpts.best().step == 2


@pytest.mark.parametrize("then", ["dies", "fails"])
def test_a_replacement_that_does_not_happen_leaves_the_old_facts(tmp_path, then, state):
    ckpts = sio.CheckpointDirectory(tmp_path, best="min")
    ckpts.save(state(1), 1, 0.1)
    if then == "fails":
        with pytest.raises(ZeroDivisionError):
            ckpts.save({"unpicklable": Unpicklable()}, 1, 0.7)
    else:
        ckpts._writer.announce(1, 0.7, durable=True)
    (found,) = sio.CheckpointDirectory(tmp_path)
    assert found.metric == 0.1 and found.load()["step"] == 1


class Unpicklable:
    def __reduce__(self):
        raise ZeroDivisionError


def test_a_save_that_fails_leaves_nothing(tmp_path, way, state):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    save(ckpts, state(1), 1, way=way)
    before = files(tmp_path)
    with pytest.raises(ZeroDivisionError):
        save(ckpts, {"unpicklable": Unpicklable()}, 2, way=way)
    with pytest.raises(TypeError):
        save(ckpts, state(2), 2, way=way, no_such_option=1)
    with pytest.raises(TypeError, match="zip format"):
        save(ckpts, state(2), 2, way=way, _use_new_zipfile_serialization=False)
    assert files(tmp_path) == before
    assert ckpts.latest().step == 1


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_asynchronous_failure_that_nobody_asked_about_is_raised_by_the_next_save(tmp_path, state, monkeypatch):
    from statedict_io.writing import replacement

    ckpts = sio.CheckpointDirectory(tmp_path)
    ckpts.save(state(1), 1)
    for asked in (False, True):
        with monkeypatch.context() as m:
            m.setattr(replacement, "sync", full_disk)
            failed = ckpts.save_async(state(2), 2)
            ckpts.wait()
        if asked:
            with pytest.raises(OSError, match="space"):
                failed.result()
            ckpts.save(state(3), 3)
        else:
            with pytest.raises(OSError, match="space"):
                ckpts.save(state(3), 3)
            assert files(tmp_path) == ["step-00000001.pt", "step-00000001.pt.json"]
    assert [found.step for found in ckpts] == [1, 3]


def test_every_failure_is_raised_by_a_save(tmp_path, state, monkeypatch):
    from statedict_io.writing import replacement

    ckpts = sio.CheckpointDirectory(tmp_path)
    both = threading.Event()
    with monkeypatch.context() as m:
        m.setattr(replacement, "sync", lambda *_: both.wait(60) and full_disk())
        for step in (1, 2):
            ckpts.save_async(state(step), step)
        both.set()
        ckpts.wait()
    for _ in range(2):
        with pytest.raises(OSError, match="space"):
            ckpts.save(state(3), 3)
    ckpts.save(state(3), 3)
    assert [found.step for found in ckpts] == [3]


class Delayed:
    """What comes after the save of a step waits until it may go on."""

    def __init__(self, monkeypatch, *steps):
        self.go_on = {step: threading.Event() for step in steps}
        real = writer.Writer.committed

        def committed(self_, announced, **options):
            if announced.step in self.go_on:
                assert self.go_on[announced.step].wait(60)
            real(self_, announced, **options)

        monkeypatch.setattr(writer.Writer, "committed", committed)


def test_an_asynchronous_save_is_done_when_the_directory_is_in_order(tmp_path, state, monkeypatch):
    delayed = Delayed(monkeypatch, 2)
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    ckpts.save_async(state(1), 1).result()
    saved = ckpts.save_async(state(2), 2)
    while len(list(ckpts)) < 2:
        time.sleep(0.001)
    assert not saved.done()
    with pytest.raises(TimeoutError):
        saved.result(timeout=0.1)
    delayed.go_on[2].set()
    saved.result(60)
    assert saved.done()
    assert files(tmp_path) == ["step-00000002.pt", "step-00000002.pt.json"]


def test_deletions_keep_pace_with_asynchronous_saves(tmp_path, state, monkeypatch):
    """Where threads come late, as on a busy machine: a file that is to go for each save in flight, and one more."""
    real = writer.Writer.committed

    def committed(*arguments, **options):
        time.sleep(0.05)
        real(*arguments, **options)

    monkeypatch.setattr(writer.Writer, "committed", committed)
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    most = 0
    for step in range(1, 13):
        ckpts.save_async(state(step), step, max_in_flight=1)
        most = max(most, len(list(ckpts)))
    ckpts.close()
    assert most <= 3
    assert [found.step for found in ckpts] == [12]


def test_asynchronous_saves_that_end_out_of_order_are_no_abandoned_run(tmp_path, state, monkeypatch, recwarn):
    delayed = Delayed(monkeypatch, 2)
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=2)
    later = ckpts.save_async(state(2), 2)
    while not list(ckpts):
        time.sleep(0.001)
    ckpts._save(state(1), 1, None, None, {})  # as a signal handler does, which waits for nothing
    delayed.go_on[2].set()
    later.result(60)
    assert not [each for each in recwarn if issubclass(each.category, sio.CheckpointDirectoryWarning)]


def test_saves_that_end_out_of_order(tmp_path, state, monkeypatch):
    from statedict_io.writing import saving

    real, go_on = saving.write, threading.Event()

    def write(source, target, *arguments, **options):
        if target.name == "step-00000001.pt":
            go_on.wait(60)
        return real(source, target, *arguments, **options)

    monkeypatch.setattr(saving, "write", write)
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    late = ckpts.save_async(state(1), 1, 0.5)
    ckpts.save_async(state(2), 2, 0.6).result()
    assert [found.step for found in ckpts] == [2]
    ckpts.save(state(3), 3)
    assert "step-00000001.pt.json" in files(tmp_path)  # of a save in flight: no leftover
    go_on.set()
    late.result()
    ckpts.wait()
    assert files(tmp_path) == ["step-00000003.pt", "step-00000003.pt.json"]


def test_leftovers_of_processes_that_died(tmp_path, state):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    ckpts.save(state(1), 1)
    ckpts.close()
    ours = [
        ".step-00000009.pt.0123456789ab.sdio-tmp",
        ".step-00000009.pt.json.0123456789ab.sdio-tmp",
        "step-00000009.0123456789ab-sdio-tmp",  # torch's
        ".latest.0123456789ab.sdio-tmp",
        "step-00000009.pt.json",
    ]
    others = [".model.pt.0123456789ab.sdio-tmp", ".hidden.sdio-tmp", "notes.txt", "step-9.pt.json"]
    for name in (*ours, *others):
        (tmp_path / name).write_text("{}")
    ckpts.save(state(2), 2)
    assert files(tmp_path) == sorted([*others, "step-00000002.pt", "step-00000002.pt.json"])


def test_leftovers_where_others_write_too(tmp_path, state):
    """A young one may be of a save in flight, and so may one that is locked."""
    young, old, locked = (f".step-00000009.pt.{digit * 12}.sdio-tmp" for digit in "123")
    facts, old_facts = "step-00000008.pt.json", "step-00000009.pt.json"
    for name in (young, old, locked, facts, old_facts):
        (tmp_path / name).write_text("{}")
    for name in (old, locked, old_facts):
        os.utime(tmp_path / name, (time.time() - 2 * 24 * 3600,) * 2)
    with open(tmp_path / locked, "r+b") as held:
        assert locks.hold(held.fileno())
        sio.CheckpointDirectory(tmp_path, allow_other_writers=True).save(state(10), 10)
        assert files(tmp_path) == sorted([young, locked, facts, "step-00000010.pt", "step-00000010.pt.json"])


def test_the_working_directory_may_change(tmp_path, monkeypatch, state):
    monkeypatch.chdir(tmp_path)
    ckpts = sio.CheckpointDirectory("runs", keep_last=1)
    ckpts.save(state(1), 1)
    monkeypatch.chdir("/")
    ckpts.save(state(2), 2)
    assert files(tmp_path / "runs") == ["step-00000002.pt", "step-00000002.pt.json"]
    assert ckpts.latest().load()["step"] == 2


@pytest.mark.parametrize("what", ["file", "missing below a file"])
def test_a_path_that_is_no_directory(tmp_path, what, state):
    (tmp_path / "file").touch()
    ckpts = sio.CheckpointDirectory(tmp_path / ("file" if what == "file" else "file/below"))
    with pytest.raises(NotADirectoryError):
        ckpts.save(state(1), 1)
    with pytest.raises(NotADirectoryError):
        ckpts.latest()


# --- protection, links, deletion


def test_protected_checkpoints_stay_also_for_other_processes(tmp_path, way, state):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    save(ckpts, state(1), 1, 0.5, way=way)
    ckpts.protect(1)
    ckpts.protect(3)  # which is not there yet
    for step in (2, 3, 4):
        save(ckpts, state(step), step, way=way)
    ckpts.close()
    again = sio.CheckpointDirectory(tmp_path, keep_last=1)
    save(again, state(5), 5, way=way)
    assert [(found.step, found.protected, found.metric) for found in again] == [
        (1, True, 0.5), (3, True, None), (5, False, None)]  # fmt: skip
    sio.CheckpointDirectory(tmp_path).protect(1, False)
    save(again, state(6), 6, way=way)
    assert [found.step for found in again] == [3, 6]


@pytest.mark.parametrize("protected", [True, False])
def test_protection_is_changed_while_the_step_is_saved_again(tmp_path, state, protected):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    ckpts.save(state(1), 1)
    ckpts.protect(1, not protected)

    class Protects:
        def __reduce__(self):
            ckpts.protect(1, protected)
            return (int, (7,))

    ckpts.save({"seven": Protects()}, 1)
    assert [found.protected for found in ckpts] == [protected]


def test_an_interrupted_digest_leaves_a_checkpoint_that_can_go(tmp_path, state, monkeypatch):
    """Ctrl-C when the hash is asked for: the file is there."""
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(FileDigest, "hexdigest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ckpts.save(state(1), 1, digest="sha256")
    assert ckpts.latest().sha256 is None
    ckpts.save(state(2), 2)
    assert [found.step for found in ckpts] == [2]
    assert ckpts.discard_after(1) == [2]


def test_a_warning_that_is_an_error_stops_no_thread(tmp_path):
    """Otherwise close() would wait for ever."""
    seen = []
    work = background.Background("test")

    def fails():
        raise sio.CheckpointDirectoryWarning("as with -W error")

    with pytest.MonkeyPatch.context() as m:
        m.setattr(threading, "excepthook", seen.append)
        work.run(fails)
        work.run(lambda: seen.append("done"))
        assert work.wait(60)
    assert [seen[0].exc_type, seen[1]] == [sio.CheckpointDirectoryWarning, "done"]


def test_links_lead_to_what_is_kept(tmp_path, way, state):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1, keep_best=1, best="min", links=True)
    for step, metric in [(1, 0.3), (2, 0.1), (3, 0.2), (4, math.nan)]:
        save(ckpts, state(step), step, metric, way=way)
        assert torch.load(tmp_path / "latest")["step"] == step
    assert torch.load(tmp_path / "best")["step"] == 2
    assert ckpts.latest().path.endswith("step-00000004.pt")


@pytest.mark.parametrize("call", ["save", "prune", "discard_after", "command"])
def test_no_link_is_left_that_leads_nowhere(tmp_path, call, state):
    """Also where the links are of an earlier run, or of somebody else."""
    with sio.CheckpointDirectory(tmp_path, keep_best=1, best="min", keep_last=9, links=True) as ckpts:
        for step, metric in [(1, 0.5), (2, 0.1), (3, 0.2), (4, 0.3)]:
            ckpts.save(state(step), step, metric)
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    if call == "save":
        ckpts.save(state(5), 5)
    elif call == "prune":
        assert ckpts.prune(dry_run=True) == ckpts.prune() == [1, 3]
    elif call == "command":
        assert main(["prune", str(tmp_path), "--keep-last", "1"]) == 0
    else:
        ckpts.discard_after(1)
    kept = {"save": [2, 5], "prune": [2, 4], "command": [2, 4], "discard_after": [1]}[call]
    assert [found.step for found in ckpts] == kept
    assert torch.load(tmp_path / "latest")["step"] == kept[-1]
    if call == "discard_after":  # which one is the best now is not known here
        assert not (tmp_path / "best").is_symlink()
        ckpts.discard_after(0)
        assert not (tmp_path / "latest").is_symlink()
    else:
        assert torch.load(tmp_path / "best")["step"] == 2


def test_what_is_no_link_is_not_replaced_by_one(tmp_path, state):
    (tmp_path / "latest").write_text("of the user")
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1, links=True)
    with pytest.warns(sio.CheckpointDirectoryWarning, match="latest: the link could not be set: something that is not"):
        ckpts.save(state(1), 1)
    assert (tmp_path / "latest").read_text() == "of the user"


def test_a_link_that_cannot_be_set_keeps_what_it_leads_to(tmp_path, state, monkeypatch):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1, links=True)
    ckpts.save(state(1), 1)
    with monkeypatch.context() as m:
        m.setattr(links.os, "symlink", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no links")))
        with pytest.warns(sio.CheckpointDirectoryWarning, match="no links"):
            ckpts.save(state(2), 2)
    assert torch.load(tmp_path / "latest")["step"] == 1
    ckpts.save(state(3), 3)
    assert [found.step for found in ckpts] == [3]


def test_a_deletion_that_fails_is_a_warning_and_tried_again(tmp_path, way, state, monkeypatch):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    save(ckpts, state(1), 1, way=way)

    def refused(*_):
        raise PermissionError(errno.EPERM, "stays")

    with monkeypatch.context() as m:
        m.setattr(local_folder.LocalFolder, "remove", refused)
        with pytest.warns(sio.CheckpointDirectoryWarning, match=r"step-00000001\.pt: could not be deleted: stays"):
            save(ckpts, state(2), 2, way=way)
    assert [found.step for found in ckpts] == [1, 2]
    save(ckpts, state(3), 3, way=way)
    assert files(tmp_path) == ["step-00000003.pt", "step-00000003.pt.json"]


def test_names_go_in_the_call_and_blocks_in_a_thread(tmp_path, state, monkeypatch):
    """Freeing the blocks of a large file takes long, and begins when its last descriptor is closed."""
    threads = {}
    real = deletion.Deletions._close

    def close(deletions, fd):
        threads[os.readlink(f"/proc/self/fd/{fd}")] = threading.current_thread()
        real(deletions, fd)

    monkeypatch.setattr(deletion.Deletions, "_close", close)
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    for step in (1, 2, 3):
        ckpts.save(state(step), step)
        assert files(tmp_path) == [f"step-{step:08d}.pt", f"step-{step:08d}.pt.json"]
    ckpts.wait(60)
    assert {os.path.basename(path) for path in threads} == {
        f"step-{step:08d}.pt{suffix} (deleted)" for step in (1, 2) for suffix in ("", ".json")
    }
    assert threading.main_thread() not in threads.values()
    assert not ckpts._writer._deletions._held


def test_going_back(tmp_path, state):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=3)
    for step in (100, 200, 300):
        ckpts.save(state(step), step)
    ckpts.close()
    again = sio.CheckpointDirectory(tmp_path, keep_last=3)
    assert again.restore(step=100) == 100
    with pytest.warns(sio.CheckpointDirectoryWarning, match="discard_after"):
        again.save(state(150), 150)
    assert again.latest().step == 300
    assert again.discard_after(150) == [300, 200]
    assert again.latest().step == 150
    assert files(tmp_path) == ["step-00000150.pt", "step-00000150.pt.json"]
