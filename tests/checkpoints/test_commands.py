"""``statedict-io list`` and ``prune``."""

import json
import os

import pytest

import statedict_io as sio
from statedict_io.__main__ import main


@pytest.fixture
def run(tmp_path, state):
    with sio.CheckpointDirectory(tmp_path / "run") as ckpts:
        for step, metric in enumerate([0.5, float("nan"), None, 0.25], start=1):
            ckpts.save(state(step), step, metric)
    return tmp_path / "run"


def truncated(run, *steps):
    for step in steps:
        os.truncate(run / f"step-{step:08d}.pt", 1000)


def steps_in(run):
    return [each.step for each in sio.CheckpointDirectory(run)]


def test_list(run, capsys):
    sio.CheckpointDirectory(run).protect(1)
    assert main(["list", str(run)]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [("1", "0.5"), ("2", "nan"), ("3", "-"), ("4", "0.25")]
    assert "protected" in shown.splitlines()[2] and " KiB " in shown and " s " in shown
    truncated(run, 3)
    assert main(["list", str(run), "--json", "--verify", "crc"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [each["problem"] is None for each in found] == [True, True, False, True]
    assert [each["metric"] for each in found] == [0.5, "nan", None, 0.25]
    assert main(["list", str(run), "--verify", "none"]) == 0
    assert main(["list", str(run), "--pattern", "other-{step}.pt"]) == 0
    assert "no checkpoints" in capsys.readouterr().out
    assert main(["list", str(run / "nowhere")]) == 2
    assert main(["list", str(run), "--pattern", "x"]) == 2


def test_prune(run, capsys):
    before = sorted(os.listdir(run))
    assert main(["prune", str(run), "--keep-last", "3", "--dry-run"]) == 0
    assert sorted(os.listdir(run)) == before
    shown = capsys.readouterr().out
    assert "step-00000001.pt: would be deleted" in shown and "1 of 4 checkpoints would go" in shown
    assert main(["prune", str(run), "--keep-last", "3"]) == 0
    assert steps_in(run) == [2, 3, 4] and len(os.listdir(run)) == 6
    assert main(["prune", str(run), "--keep-best", "1", "--best", "max"]) == 0
    assert steps_in(run) == [4]


def test_prune_never_deletes_the_newest_sound_one(run, capsys):
    truncated(run, 3, 4)
    assert main(["prune", str(run), "--keep-last", "1"]) == 0
    assert steps_in(run) == [2, 3, 4]
    assert "passed over" in capsys.readouterr().err
    truncated(run, 2)
    assert main(["prune", str(run), "--keep-last", "1"]) == 1
    assert steps_in(run) == [2, 3, 4]
    assert "none of its checkpoints is sound" in capsys.readouterr().err


def test_prune_lets_a_run_be_that_saves_there(run, state, capsys):
    with sio.CheckpointDirectory(run) as ckpts:
        ckpts.save(state(5), 5)
        assert main(["prune", str(run), "--keep-last", "1"]) == 2
        assert "saves checkpoints here" in capsys.readouterr().err
        assert main(["prune", str(run), "--keep-last", "1", "--dry-run"]) == 0
    assert steps_in(run) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [([], "--keep-last"), (["--keep-last", "0"], "at least 1"), (["--keep-best", "1"], "--best min")],
)
def test_rules_that_cannot_be(run, arguments, cure, capsys):
    assert main(["prune", str(run), *arguments]) == 2
    assert cure in capsys.readouterr().err
    assert len(steps_in(run)) == 4
