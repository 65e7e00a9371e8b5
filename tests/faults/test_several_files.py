"""SIGKILL at every call of a save of shards, or of a file and its sum, and every call failing: readers find the old
files or the new ones, and no sum that does not fit."""

import json

import pytest

from faults.preload import run_module
from faults.test_fault_injection import require

SETS = pytest.mark.parametrize(
    ("old", "new", "sums"),
    [
        (3, 3, "sum"),
        (1, 3, "sum"),
        (3, 1, "sum"),
        (0, 0, "sum"),
        (0, 0, "no-sum"),
        pytest.param(3, 3, "no-sum", marks=pytest.mark.long),
    ],
)
SIZES = pytest.mark.parametrize(
    ("way", "size"),
    [("native", "quick"), *(pytest.param(way, "exhaustive", marks=pytest.mark.long) for way in ("native", "torch"))],
)
pytestmark = pytest.mark.timeout(900)


def run(preload, *arguments):
    return json.loads(run_module(preload, "several_files_process", *arguments, timeout=850))


@SETS
@SIZES
def test_killed_savers_leave_whole_files(way, size, old, new, sums, preload, tmp_path, report_counts):
    require(way)
    counts = json.loads(
        run_module(preload, "several_files_process", tmp_path, way, "kills", old, new, sums, size, timeout=850)
    )
    report_counts(
        f"{old} by {new}, {sums}, {way}: {counts['kills']} SIGKILLs, {counts['new']} left the new set, 0 a mixture"
    )
    assert counts["kills"] > (15 if new else 7)
    assert 0 < counts["new"] < counts["kills"]


@SETS
@SIZES
def test_every_call_failing(way, size, old, new, sums, preload, tmp_path, report_counts):
    require(way)
    counts = json.loads(
        run_module(preload, "several_files_process", tmp_path, way, "errors", old, new, sums, size, timeout=850)
    )
    report_counts(
        f"{old} by {new}, {sums}, {way}: {counts['faults']} saves disturbed, {counts['refused']} refused, 0 mixtures"
    )
    assert counts["faults"] > (60 if new else 30)
    assert 0 < counts["refused"] < counts["faults"]
