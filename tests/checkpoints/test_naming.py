"""Patterns make names of steps, and read them back from names that are theirs alone."""

import os

import pytest

import statedict_io as sio
from statedict_io.checkpoints.naming import Pattern


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("step-{step:08d}.pt", {0: "step-00000000.pt", 123_456_789: "step-123456789.pt"}),
        ("{step}", {0: "0", 7: "7"}),
        ("run {{7}} [a]*?{step:04}é.ckpt", {7: "run {7} [a]*?0007é.ckpt"}),
        ("2024-{step}.pt", {5: "2024-5.pt"}),
    ],
)
def test_names_and_steps(text, names):
    pattern = Pattern(text)
    for step, name in names.items():
        assert pattern.name_of(step) == name
        assert pattern.step_of(name) == step


@pytest.mark.parametrize(
    "name",
    [
        *("step-1.pt", "step-00000001.pt.json", "xstep-00000001.pt", "step-00000001.pt\n", ".step-00000001.pt"),
        *(
            "step-0000000\N{ARABIC-INDIC DIGIT ONE}.pt",
            "step--0000001.pt",
            "step-000000001.pt",
            "step-00000001.PT",
            "latest",
        ),
    ],
)
def test_names_that_are_not_of_the_pattern(name):
    assert Pattern("step-{step:08d}.pt").step_of(name) is None


@pytest.mark.parametrize(
    "text",
    [
        *("last.pt", "{step}{step}.pt", "{epoch}.pt", "{}.pt", "{step", "{step!r}.pt", "{step.real}.pt", "{step:x}.pt"),
        *("{step:,}.pt", "{step:>8}.pt", "{step:+}.pt", "{step:.2f}.pt", "a/{step}.pt", "a\\{step}.pt", "\0{step}"),
        *(".{step}.pt", "{step}.json"),
    ],
)
def test_patterns_that_cannot_be(text):
    with pytest.raises(ValueError, match="pattern"):
        sio.CheckpointDirectory("runs", pattern=text)


def test_a_pattern_that_promises_another_format():
    with pytest.raises(sio.FileKindError, match=r"a name that ends in \.pt"):
        sio.CheckpointDirectory("runs", pattern="{step}.safetensors")


@pytest.mark.parametrize("step", [-1, 1.5, "7", None])
def test_steps_that_are_none(step, tmp_path):
    with pytest.raises((TypeError, ValueError), match=r"^step must be"):
        sio.CheckpointDirectory(tmp_path / "runs").save({}, step)
    assert not os.path.exists(tmp_path / "runs")


@pytest.mark.parametrize("pattern", ["{{{step}}}.pt", "ü [{step:03}] *.pt", "{step}", "-{step} %s.ckpt"])
def test_odd_patterns_and_directories(pattern, tmp_path, backend):
    ckpts = sio.CheckpointDirectory(tmp_path / "rün [1]*", pattern=pattern, keep_last=2)
    for step in (8, 9, 10, 11):
        ckpts.save({"step": step}, step, backend=backend)
    assert [found.step for found in ckpts] == [10, 11]  # by number, not by name
    assert ckpts.latest().load() == {"step": 11}
