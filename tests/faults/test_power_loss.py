"""The model of power loss, replayed over recorded saves: see power_loss.py for what it assumes."""

import hashlib
import os
import pickle
import random

import pytest

import statedict_io as sio
from faults.power_loss import Flush, History, Operation, examine
from faults.preload import run_module


@pytest.fixture(scope="module")
def recorded(preload, tmp_path_factory):
    directory = tmp_path_factory.mktemp("records")
    ways = [
        "torch",
        "legacy",
        "stock",
        "safetensors_torch",
        *(["native", "safetensors"] if sio.backend_info().name == "native" else []),
    ]
    run_module(preload, "power_loss_process", directory, *ways)
    return {name: pickle.loads((directory / f"{name}.pickle").read_bytes()) for name in ("records", "sums")}


@pytest.fixture(scope="module")
def records(recorded):
    return recorded["records"]


def histories(records, *, durable, stock=False):
    for name, was_durable, events, target, before, after in records:
        if was_durable == durable and name.startswith("stock") == stock:
            yield name, History.of(events, target), before, after


def is_flush_of_file(step):
    return isinstance(step, Flush) and step.inode is not None


def is_flush_of_directory(step):
    return isinstance(step, Flush) and step.directory is not None


def test_a_durable_save_survives_power_loss_at_every_step(records, report_counts):
    prefixes = states = 0
    for name, history, before, after in histories(records, durable=True):
        kinds = [step.kind if isinstance(step, Operation) else "flush" for step in history.steps]
        assert kinds.count("write") >= 1 and kinds[-2:] == ["rename", "flush"], f"{name}: {kinds}"
        verdict = examine(history, before, after)
        assert verdict.violations == 0, f"{name}: {verdict}"
        assert verdict.lost_after_return == 0, f"{name}: {verdict}"
        prefixes += verdict.prefixes
        states += verdict.states
    report_counts(f"power loss: {prefixes} prefixes, {states} states of the disk, 0 without the old or the new file")
    assert prefixes > 50


def test_order_on_the_device(records):
    """Write, fsync, close, rename, fsync of the directory: some network mounts refuse to rename an open file."""
    for name, durable, events, target, _, _ in records:
        if name.startswith("stock"):
            continue
        made = next(e for e in events if e.call == "openat" and e.offset & os.O_CREAT and not e.error)
        directory = next(e for e in events if e.call == "open" and e.path == os.path.dirname(target) and e.result >= 0)
        of_file = [e.call for e in events[events.index(made) + 1 :] if e.fd == made.result or e.call == "renameat"]
        order = [call for call in of_file if call in ("fsync", "close", "renameat")]
        assert order[: order.index("renameat") + 1] == ["fsync"] * durable + ["close", "renameat"], name
        writes = [i for i, call in enumerate(of_file) if "write" in call or call == "ftruncate"]
        assert writes and max(writes) < of_file.index("fsync" if durable else "close"), name
        after = events[events.index(next(e for e in events if e.call == "renameat")) + 1 :]
        assert [e.call for e in after if e.fd == directory.result] == ["fsync"] * durable + ["close"], name


def test_temporaries_are_made_by_exclusion_and_under_unique_names(records):
    names = set()
    for name, _, events, target, _, _ in records:
        if name.startswith("stock"):
            continue
        (made,) = [e for e in events if e.call == "openat" and e.offset & os.O_CREAT]
        wanted = os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        assert made.offset & wanted == wanted and not made.offset & os.O_TRUNC, name
        (directory,) = {e.path for e in events if e.call == "open" and e.result == made.fd}
        assert directory == os.path.dirname(target), name
        names.add(made.path)
    assert len(names) == sum(not name.startswith("stock") for name, *_ in records) > 10


def test_the_model_sees_a_forgotten_fsync_of_the_file(records):
    for name, history, before, after in histories(records, durable=True):
        broken = history.without(is_flush_of_file)
        assert len(broken.steps) == len(history.steps) - 1
        assert examine(broken, before, after, first_violation_only=True).violations > 0, name


def test_the_model_sees_a_forgotten_fsync_of_the_directory(records):
    for name, history, before, after in histories(records, durable=True):
        verdict = examine(history.without(is_flush_of_directory), before, after)
        assert verdict.violations == 0, name
        assert verdict.lost_after_return > 0, name


def test_the_model_sees_a_rename_before_the_fsync(records):
    for name, history, before, after in histories(records, durable=True):
        rename = next(step for step in history.steps if isinstance(step, Operation) and step.kind == "rename")
        steps = [step for step in history.steps if step is not rename]
        steps.insert(next(i for i, step in enumerate(steps) if is_flush_of_file(step)), rename)
        broken = History(history.target, steps)
        assert examine(broken, before, after, first_violation_only=True).violations > 0, name


def test_the_model_sees_that_saving_in_place_loses_both(records):
    seen = 0
    for name, history, before, after in histories(records, durable=True, stock=True):
        if before is not None:
            assert examine(history, before, after, first_violation_only=True).violations > 0, name
            seen += 1
    assert seen


def test_what_is_not_durable_may_be_lost(records):
    """Why durable=True is the default; a file system may well do better than the model."""
    for name, history, before, after in histories(records, durable=False):
        assert examine(history, before, after, first_violation_only=True).violations > 0, name


def misfits(history, before, after):
    """States in which the file is neither the old nor the new one, or the sum beside it is of another."""
    target, sidecar = history.target, f"{history.target}.sha256"
    right = {
        content: f"{hashlib.sha256(content).hexdigest()}  model.pt\n" for content in (before[target], after[target])
    }
    for num_steps in range(len(history.steps) + 1):
        for state in history.states(num_steps, random.Random(num_steps)):
            files = history.contents(state, before)
            line = files.get(sidecar, b"").decode()
            if line not in ("", right.get(files.get(target), "no such file")) or files.get(target) not in right:
                yield num_steps
            if num_steps == len(history.steps):
                assert files.get(sidecar) == after.get(sidecar)


def test_no_sum_is_that_of_another_file(recorded):
    for way, events, target, before, after in recorded["sums"]:
        assert next(misfits(History.of(events, target, (f"{target}.sha256",)), before, after), None) is None, way


def test_the_model_sees_a_sum_that_is_not_removed_first(recorded):
    way, events, target, before, after = recorded["sums"][0]
    history = History.of(events, target, (f"{target}.sha256",))
    kept = history.without(lambda step: isinstance(step, Operation) and step.kind == "unname")
    assert len(kept.steps) == len(history.steps) - 1 and next(misfits(kept, before, after), None) is not None, way
    unname = next(i for i, step in enumerate(history.steps) if getattr(step, "kind", "") == "unname")
    flush = next(step for step in history.steps[unname:] if is_flush_of_directory(step))
    assert next(misfits(history.without(lambda step: step is flush), before, after), None) is not None, way
