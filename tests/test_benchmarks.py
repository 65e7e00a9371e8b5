"""The benchmarks run: small, once, nothing is looked at but that they end well."""

import json
import pathlib
import subprocess
import sys

import pytest

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
