"""The benchmarks run, small and once, and end well; turns and sums are right."""

import collections
import gzip
import itertools
import json
import pathlib
import subprocess
import sys

import pytest

import statedict_io as sio
from benchmarks import report, timeline
from benchmarks.turns import in_turn

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.timeout(200)
def test_asynchronous(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.asynchronous", "--smoke", "--dir", str(tmp_path), "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr
    document = json.loads(out.read_text())
    for part in ("stall", "training"):
        assert "statedict_io.save_async" in document[part]["contenders"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.timeout(200)
def test_saving(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.saving", "--smoke", "--dir", str(tmp_path), "--out", str(out)]
    run = subprocess.run([*command, "--parts", "llama", "gil"], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr + run.stdout
    document = json.loads(out.read_text())
    assert [of_run["part"] for of_run in document["runs"]] == ["llama", "gil"]
    asked = [check["what"] for check in document["checks"]]
    assert "llama 256 KiB, durable: raw_direct / native" in asked
    assert "gil 512 KiB, native: largest gap of another thread, ms" in asked
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.timeout(200)
def test_another_checkout_takes_part(tmp_path):
    command = [sys.executable, "-m", "benchmarks.saving", "--smoke", "--dir", str(tmp_path), "--before", str(ROOT)]
    run = subprocess.run([*command, "--parts", "tmpfs"], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr + run.stdout
    assert "before native / native" in run.stdout


@pytest.mark.timeout(200)
def test_timeline(tmp_path):
    out, trace = tmp_path / "out.json", tmp_path / "trace.json.gz"
    command = [sys.executable, "-m", "benchmarks.timeline", "--smoke", "--dir", str(tmp_path), "--out", str(out)]
    run = subprocess.run([*command, "--trace", str(trace)], cwd=ROOT, capture_output=True, text=True, timeout=180)
    if sio.backend_info().name != "native":
        assert run.returncode == 1 and "recorded by the extension" in run.stderr
        return
    assert run.returncode == 0, run.stderr
    of_save = json.loads(out.read_text())["timeline"]
    assert {"copy_and_crc32", "write"} <= set(of_save["summary"]["steps"]) or "crc32" in of_save["summary"]["steps"]
    assert sum(of_save["summary"]["writes"]) == pytest.approx(of_save["save_s"])
    assert all(0 <= step["start_s"] <= step["end_s"] <= of_save["save_s"] for step in of_save["steps"])
    assert b"statedict_io::write" in gzip.decompress(trace.read_bytes())
    command = [sys.executable, "-m", "benchmarks.report", str(out)]
    assert "| write |" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sorted(tmp_path.iterdir()) == [out, trace]


@pytest.mark.parametrize("stored", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_stored_results_are_shown(tmp_path, stored):
    """As tables of at most seven columns, and as pictures."""
    document = json.loads(stored.read_text())
    tables = [line for line in report.markdown(document).splitlines() if line.startswith("|")]
    assert len(tables) > 3 and all(line.count("|") <= 8 for line in tables)
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    drawn = plots.draw(document, tmp_path, stored.stem)
    assert drawn and sorted(drawn) == sorted(tmp_path.iterdir())


@pytest.mark.parametrize("names", ["", "a", "ab", "abc", "abcd", "abcde", "abcdef", "abcdefg"])
def test_each_comes_after_each_other_one_as_often(names):
    rounds = [in_turn(names, number) for number in range(2 * len(names))]
    assert all(sorted(order) == sorted(names) for order in rounds)
    after = collections.Counter(pair for order in rounds for pair in itertools.pairwise(order))
    assert after == {(a, b): 2 for a in names for b in names if a != b}
    first = collections.Counter(order[0] for order in rounds)
    assert first == dict.fromkeys(names, 2)


def test_what_a_timeline_is_summed_up_to():
    step = timeline.Step
    steps = [
        step("crc32", "thread 0", 0.0, 1.0),
        step("write", "thread 0", 1.0, 3.0),
        step("crc32", "thread 1", 2.0, 2.5),
        step("crc32", "thread 2", 2.25, 4.0),
        step("write", "thread 1", 2.5, 3.5),
    ]
    summary = timeline.summary(steps, save_s=5.0)
    assert summary["steps"]["crc32"] == {
        "count": 3,
        "lanes": 3,
        "total_s": 3.25,
        "in_progress_s": 3.0,
        "in_progress_beside_writes_s": 1.5,
    }
    assert summary["steps"]["write"]["in_progress_s"] == 2.5
    assert summary["nothing_in_progress_s"] == 1.0
    assert summary["writes"] == [2.5, 2.0, 0.5]


@pytest.mark.timeout(200)
def test_reading(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.reading", "--smoke", "--dir", str(tmp_path), "--out", str(out)]
    command += ["--parts", "cold", "rows", "--only", "statedict_io", "torch.load", "raw"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    document = json.loads(out.read_text())
    cold, rows = (document["parts"][part]["contenders"] for part in ("cold", "rows"))
    assert set(cold) == {"statedict_io", "torch.load", "raw"}
    if "was to be cold" in cold["torch.load"]["status"]:
        pytest.skip("nothing is ever cold on this file system")
    assert all(entry["status"] == "ok" and entry["median"]["s"] > 0 for entry in cold.values())
    assert rows["statedict_io"]["median"]["read_bytes"] <= 2 * rows["statedict_io"]["median"]["wanted_bytes"]
    assert run.returncode == 0, run.stderr + run.stdout
    assert len(document["checks"]) == 3
    assert list(tmp_path.iterdir()) == [out]
