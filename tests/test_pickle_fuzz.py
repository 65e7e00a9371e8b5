"""Random pickles and safetensors headers: see tests/fuzz/pickle_fuzz.py, which repeats a run that failed here."""

import json
import pathlib
import subprocess
import sys

import pytest

FUZZ = pathlib.Path(__file__).parent / "fuzz" / "pickle_fuzz.py"


def fuzz(backend, num_runs, timeout_s):
    command = [sys.executable, FUZZ, "--runs", str(num_runs), "--backends", backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_some_random_pickles(backend, report_counts):
    found = fuzz(backend, 100, 280)
    assert found["calls"] > 400
    report_counts(f"random pickles, {backend}: {found}")


@pytest.mark.long
@pytest.mark.timeout(12 * 3600)
def test_many_random_pickles(backend, report_counts):
    report_counts(f"random pickles, {backend}: {fuzz(backend, 100_000, 12 * 3600)}")
