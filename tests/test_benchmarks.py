"""The benchmarks run, small and once, and end well; turns and sums are right."""

import argparse
import collections
import contextlib
import gzip
import itertools
import json
import pathlib
import subprocess
import sys

import pytest

import statedict_io as sio
from benchmarks import program, report, results, timeline
from benchmarks.processes import WorkerProcess
from benchmarks.turns import in_turn, rounds

ROOT = pathlib.Path(__file__).resolve().parent.parent


def smoke(program, directory, *options, returncode=0):
    """What a small run of the program prints and stores; it leaves nothing else behind."""
    out = directory / "out.json"
    command = [sys.executable, "-m", f"benchmarks.{program}", "--smoke", "--dir", directory, "--out", out, *options]
    run = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert run.returncode == returncode, run.stderr + run.stdout
    assert list(directory.iterdir()) == ([out] if returncode == 0 else [])
    return run, json.loads(out.read_text()) if returncode == 0 else None


@pytest.mark.timeout(200)
def test_asynchronous(tmp_path):
    _, document = smoke("asynchronous", tmp_path)
    for part in ("stall", "training"):
        assert document[part]["contenders"]["statedict_io.save_async"]["rounds"] == 1


@pytest.mark.timeout(200)
def test_directories(tmp_path):
    run, document = smoke("directories", tmp_path)
    *saves, latest = document["directories"]
    assert [(part["payload_bytes"], part["durable"], part["extra"]["rounds"]) for part in saves] == [
        (nbytes, durable, 1) for nbytes in (64 << 10, 4 << 20) for durable in (True, False)
    ]
    assert latest["files"] == 20 and set(latest["contenders"]) == {"by hand", "statedict_io.CheckpointDirectory"}
    assert all(each["status"] == "ok" for part in (*saves, latest) for each in part["contenders"].values())
    assert len(document["checks"]) == 5 and "latest() of 20 checkpoints: ms" in run.stdout


@pytest.mark.timeout(200)
def test_saving(tmp_path):
    _, document = smoke("saving", tmp_path, "--parts", "llama", "gil")
    assert [of_run["part"] for of_run in document["runs"]] == ["llama", "gil"]
    asked = [check["what"] for check in document["checks"]]
    assert "llama 256 KiB, durable: raw_direct / native" in asked
    assert "gil 512 KiB, native: largest gap of another thread, ms" in asked


@pytest.mark.timeout(200)
def test_another_checkout_takes_part(tmp_path):
    """With its library and this one's way of measuring."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "statedict_io").symlink_to(ROOT / "statedict_io")
    measured = tmp_path / "measured"
    measured.mkdir()
    run, document = smoke("saving", measured, "--before", checkout, "--parts", "tmpfs")
    assert "before native / native" in run.stdout
    (of_run,) = document["runs"]
    about = {key: of["about"].get("statedict_io file") for key, of in of_run["contenders"].items()}
    assert about["before native"] == str(checkout / "statedict_io" / "__init__.py")
    assert about["native"] == str(ROOT / "statedict_io" / "__init__.py")


@pytest.mark.timeout(200)
def test_ranks(tmp_path):
    _, document = smoke("ranks", tmp_path)
    assert {"one_file", "one_rank", "gather", "stock"} <= set(document["ranks"]["contenders"])


@pytest.mark.long
@pytest.mark.timeout(200)
def test_remote_ranks(tmp_path):
    pytest.importorskip("s3fs")
    _, document = smoke("remote_ranks", tmp_path)
    assert set(document["remote_ranks"]["ranks"]) == {"1", "2"}


@pytest.mark.timeout(200)
def test_remote(tmp_path):
    pytest.importorskip("s3fs")
    contenders = ["statedict_io", "operations_presigned"]
    _, document = smoke("remote", tmp_path, "--contenders", *contenders)
    first, save, load = document["remote"]
    assert [part["action"] for part in (first, save, load)] == ["first_tensor", "save", "load"]
    assert list(save["contenders"]) == list(load["contenders"]) == contenders
    assert list(first["contenders"]) == ["statedict_io"]
    for part in (save, load, first):
        for of in part["contenders"].values():
            assert of["status"] == "ok" and of["rounds"] == 1
            assert of["median"]["s"] >= part["latency_s"] and of["median"]["requests"] >= 1
    assert save["contenders"]["operations_presigned"]["median"]["kinds"] == {"create": 1, "part": 2, "complete": 1}
    tables = [line for line in report.markdown(document).splitlines() if line.startswith("|")]
    assert len(tables) == 3 * 2 + 5


@pytest.mark.timeout(200)
def test_timeline(tmp_path):
    if sio.backend_info().name != "native":
        run, _ = smoke("timeline", tmp_path, returncode=1)
        assert "recorded by the extension" in run.stderr
        return
    trace = tmp_path / "trace.json.gz"
    measured = tmp_path / "measured"
    measured.mkdir()
    _, document = smoke("timeline", measured, "--trace", trace)
    of_save = document["timeline"]
    assert {"copy_and_crc32", "write"} <= set(of_save["summary"]["steps"]) or "crc32" in of_save["summary"]["steps"]
    assert sum(of_save["summary"]["writes"]) == pytest.approx(of_save["save_s"])
    assert all(0 <= start <= end <= of_save["save_s"] for _, _, start, end in of_save["steps"])
    assert b"statedict_io::write" in gzip.decompress(trace.read_bytes())
    command = [sys.executable, "-m", "benchmarks.report", str(measured / "out.json")]
    assert "| write |" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("stored", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_stored_results_are_shown(tmp_path, stored):
    """As tables of at most seven columns, and as pictures."""
    document = json.loads(stored.read_text())
    assert document == program.without_samples(document)
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
    parts = ["--parts", "cold", "rows", "--only", "statedict_io", "torch.load", "raw"]
    try:
        _, document = smoke("reading", tmp_path, *parts)
    except AssertionError as failure:
        if "was to be cold" in str(failure):
            pytest.skip("nothing is ever cold on this file system")
        raise
    cold, rows = (document["parts"][part]["contenders"] for part in ("cold", "rows"))
    assert set(cold) == {"statedict_io", "torch.load", "raw"}
    assert all(entry["status"] == "ok" and entry["median"]["s"] > 0 for entry in cold.values())
    assert rows["statedict_io"]["median"]["read_bytes"] <= 2 * rows["statedict_io"]["median"]["wanted_bytes"]
    assert len(document["checks"]) == 3


def test_what_is_kept_of_samples():
    seconds = [9.0, 1.0, 4.0, 2.0, 3.0, 123456.789]
    of = results.measured([{"s": s, "cold": {"s": s / 3}, "cache": "warm", "gap": None} for s in seconds])
    assert of["first"]["s"] == 9.0 and of["rounds"] == 5
    assert of["median"] == {"s": 3.0, "cold": {"s": 1.0}}
    assert of["spread"] == {"s": [1.0, 2.0, 4.0, 123457.0], "cold": {"s": [0.333333, 0.666667, 1.33333, 41152.3]}}
    assert [sample["s"] for sample in of["samples"]] == seconds[1:]
    assert results.measured([])["median"] == {} and results.measured([{"s": 1.0}])["spread"] == {}


def test_samples_go_to_a_file_of_their_own(tmp_path):
    options = argparse.Namespace(out=tmp_path / "out.json", samples=tmp_path / "samples.json")
    document = {"a  [b]": [1, 2.5, "x  y"], "runs": [{"native": results.measured([{"s": 1.0}, {"s": 2.0}])}]}
    program.write(document, options)
    assert json.loads(options.samples.read_text()) == document
    (run,) = json.loads(options.out.read_text())["runs"]
    assert "samples" not in run["native"] and run["native"]["median"] == {"s": 2.0}
    assert "[1, 2.5" in options.out.read_text()


def test_rounds_end_in_time():
    assert [(number, last) for number, _, last in rounds("ab", 2)] == [(0, False), (1, False), (2, True)]
    assert [(number, last) for number, _, last in rounds("ab", 9, seconds=0)] == [(0, False), (1, True)]


@pytest.fixture
def worker():
    with contextlib.ExitStack() as ends:

        def start(*arguments, **options):
            process = WorkerProcess(*arguments, **options)
            ends.callback(process.close)
            process.wait_started()
            return process

        yield start


def test_a_worker_that_can_not_or_does_not(worker):
    missing = worker("reader", "no such library")
    assert missing.status == "failed" and "no such library" in missing.reason
    skipped = worker("saver", "raw_pinned", device="cpu", op="save")
    assert (skipped.status, skipped.reason) == ("skipped", "the tensors are on the CPU")
    assert skipped.order("save", path="nowhere") is None
    failing = worker("saver", "torch", device="cpu", op="save")
    assert failing.about["torch"]
    assert failing.order("build", case="one", nbytes=64, payload_nbytes=None)["payload_bytes"] == 64
    assert failing.order("load", path="/nowhere/a.pt", cold=False) is None
    assert failing.status == "failed" and "FileNotFoundError" in failing.reason


def test_a_worker_that_takes_too_long(worker):
    process = worker("saver", "torch", device="cpu", op="save", timeout_s=0.01)
    assert process.status == "failed" and "limit 0.01 s" in process.reason
    assert process.order("load", path="a.pt", cold=False) is None
