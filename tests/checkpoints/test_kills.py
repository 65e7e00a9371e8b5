"""SIGKILL at every call of a save and at random moments of a loop: the newest checkpoint is found, nothing stays."""

import json

import pytest
from conftest import require_native
from faults.preload import run_module


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("way", "num_random"),
    [
        ("native", 10),
        ("torch", 10),
        ("native-async", 10),
        *(pytest.param(way, 200, marks=pytest.mark.long) for way in ("native", "native-async", "torch", "torch-async")),
    ],
)
def test_a_killed_loop_loses_nothing_that_was_committed(way, num_random, preload, tmp_path, report_counts):
    if way.startswith("native"):
        require_native()
    counts = json.loads(run_module(preload, "checkpoints.kills_process", tmp_path, way, num_random, 18, timeout=850))
    report_counts(
        f"directory, {way}: {counts['kills']} SIGKILLs ({counts['at_calls']} at calls), {counts['reads']} reads "
        f"meanwhile, {counts['leftovers']} leftovers cleaned, 0 lost, {counts['most_files']} files at most"
    )
    assert counts["at_calls"] >= 100
    assert 0 < counts["new"] < counts["kills"]  # both sides of the commit were met
    assert counts["leftovers"] > 20 and counts["reads"] > 20
