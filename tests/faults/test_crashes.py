"""SIGKILL at every call of a save and at random moments: the path always holds a whole checkpoint."""

import json

import pytest

from faults.preload import run_module
from faults.test_fault_injection import require


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("way", "num_random"),
    [
        ("native", 30),
        ("torch", 30),
        ("legacy", 0),
        ("stock", 0),
        ("native-async", 10),
        ("torch-async", 10),
        ("safetensors", 10),
        *(pytest.param(way, 500, marks=pytest.mark.long) for way in ("native", "torch", "native-async", "safetensors")),
    ],
)
def test_killed_savers_leave_a_whole_file(way, num_random, preload, tmp_path, report_counts):
    require(way.partition("-")[0])
    counts = json.loads(run_module(preload, "crash_process", tmp_path, way, num_random, 20, timeout=850))
    report_counts(
        f"{way}: {counts['kills']} SIGKILLs ({counts['at_calls']} at calls), {counts['reads']} reads meanwhile, "
        f"{counts['leftovers']} leftovers cleaned, 0 torn or missing"
    )
    assert counts["at_calls"] >= 40
    # Both sides of the rename were met, and kills left something to clean.
    assert 0 < counts["new_file"] < counts["kills"]
    assert counts["leftovers"] > 5
    assert counts["reads"] > 20
