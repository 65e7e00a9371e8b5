"""examples/: what is killed resumes to the same losses; patched and plain saves give equal files."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys

import pytest
from conftest import require_package
from oracle import assert_same_bytes

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
RUNNER = pathlib.Path(__file__).with_name("forked_runs.py")
SEED = 0
STOPPED = 128 + signal.SIGTERM

CASES = {
    "train": {"needs": [], "die": 35, "steps": 60, "stop": 23},
    "lightning_trainer": {"needs": ["lightning"], "die": 22, "steps": 30},
    "transformers_trainer": {"needs": ["transformers", "accelerate"], "die": 13, "steps": 20},
    "accelerate_loop": {"needs": ["accelerate"], "die": 23, "steps": 30},
}
HAVE_PLAIN = ["lightning_trainer", "transformers_trainer", "accelerate_loop"]


def run(example, directory, runs):
    """What each of ``runs`` printed, how it ended and how many saves were ours, by name."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{EXAMPLES.parent}:{EXAMPLES}",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    environment["OMP_NUM_THREADS"] = "1"  # more would spin where processes share few cores
    ended = subprocess.run(
        [sys.executable, str(RUNNER), str(EXAMPLES / f"{example}.py"), str(directory)],
        input=json.dumps(runs),
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        start_new_session=True,
    )
    assert ended.returncode == 0, ended.stderr
    results = json.loads(ended.stdout.splitlines()[-1])
    for result in results.values():
        assert result["status"] in (0, -signal.SIGKILL, STOPPED), f"{result['output']}\n{ended.stderr}"
    return results


def losses(result):
    """The line of each step; the last line may have been cut by the kill."""
    complete = result["output"].rpartition("\n")[0]
    return dict(re.findall(r"^step (\d+) (loss \S+)$", complete, re.M))


def final_weights(result):
    (digest,) = re.findall(r"^weights (\w{64})$", result["output"], re.M)
    return digest


@pytest.fixture(scope="module", params=CASES)
def example(request, tmp_path_factory):
    """An example's name, its directory, and its runs."""
    name, case = request.param, CASES[request.param]
    for package in case["needs"]:
        require_package(package)
    draw = random.Random(SEED)
    directory = tmp_path_factory.mktemp(name)
    runs = [{"name": "whole", "arguments": [], "move_to": "whole"}]
    if name in HAVE_PLAIN:
        runs.append({"name": "plain", "arguments": ["--saver", "plain"], "move_to": "plain"})
    if name == "lightning_trainer":
        runs.append({"name": "patched", "arguments": ["--saver", "patched"], "move_to": "patched"})
        runs.append({"name": "sync", "arguments": ["--saver", "sync"], "move_to": "sync"})
    runs.append({"name": "killed", "arguments": ["--die-at-step", str(case["die"])]})
    runs.append({"name": "resumed", "arguments": [], "move_to": "resumed"})
    for number in range(3 if request.config.getoption("--long") else 1):
        moment = (draw.randrange(case["steps"] // 5, case["steps"] // 3), draw.uniform(0, 0.02))
        runs.append({"name": f"killed at random {number}", "arguments": [], "kill_after": moment})
    runs.append({"name": "resumed at last", "arguments": [], "move_to": "at last"})
    if "stop" in case:
        runs.append({"name": "stopped", "arguments": [], "stop_in_step": case["stop"]})
        runs.append({"name": "resumed when stopped", "arguments": []})
    print(f"seed {SEED}: {runs}")
    return name, directory, run(name, directory, runs)


def test_a_killed_run_resumes_to_the_losses_of_one_that_was_not(example):
    name, _, results = example
    expected = losses(results["whole"])
    assert sorted(map(int, expected)) == list(range(1, CASES[name]["steps"] + 1))
    assert len(set(expected.values())) > len(expected) // 2
    killed, resumed = losses(results["killed"]), losses(results["resumed"])
    assert results["killed"]["status"] == -signal.SIGKILL
    assert "resumed" in results["resumed"]["output"]
    assert 1 not in map(int, resumed) and len(killed) == CASES[name]["die"]
    assert {**killed, **resumed} == expected
    assert set(killed.items()) | set(resumed.items()) == set(expected.items())
    assert final_weights(results["resumed"]) == final_weights(results["whole"])


def test_so_does_one_that_is_killed_at_any_moment(example):
    _, _, results = example
    expected = losses(results["whole"]).items()
    assert results["resumed at last"]["status"] == 0
    for run_name, result in results.items():
        if "at random" in run_name or "at last" in run_name:
            assert losses(result).items() <= expected, f"seed {SEED}, {run_name}"
    assert final_weights(results["resumed at last"]) == final_weights(results["whole"])


def test_one_that_is_told_to_stop_saves_and_resumes_at_that_step(example):
    name, _, results = example
    if "stop" not in CASES[name]:
        pytest.skip("leaves signals to the library it shows")
    stopped, resumed = results["stopped"], results["resumed when stopped"]
    assert stopped["status"] == STOPPED and resumed["status"] == 0
    step = CASES[name]["stop"]
    assert f"stopped after step {step}\n" in stopped["output"]
    assert f"resumed after step {step}\n" in resumed["output"]
    before, after = losses(stopped), losses(resumed)
    assert sorted(map(int, before)) == list(range(1, step + 1))
    assert {**before, **after} == losses(results["whole"]) and not before.keys() & after.keys()
    assert final_weights(resumed) == final_weights(results["whole"])


def test_patched_and_plain_saves_give_equal_files(example):
    name, directory, results = example
    if name not in HAVE_PLAIN:
        pytest.skip("saves with statedict_io itself")
    patched = "patched" if "patched" in results else "whole"
    assert results[patched]["saves"] > 0 and results["plain"]["saves"] == 0
    files = sorted(path.relative_to(directory / "plain") for path in (directory / "plain").rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(directory / patched) for path in (directory / patched).rglob("*") if path.is_file()
    )
    archives = 0
    for file in files:
        if file.name == "trainer_state.json":  # holds how long it took
            continue
        archives += (directory / "plain" / file).read_bytes()[:4] == b"PK\3\4"
        assert_same_bytes(directory / "plain" / file, directory / patched / file)
    assert archives >= 1
    for other in set(results) & {"plain", "patched", "sync"}:
        assert losses(results[other]) == losses(results["whole"])


def test_every_example_is_run_by_a_test():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*CASES, "demo", "command_line"}
