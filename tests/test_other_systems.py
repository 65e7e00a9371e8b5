"""Windows and macOS as far as Linux can show them: the names that they lack are taken away, in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from corpus import CORPUS
from oracle import assert_same_bytes

import statedict_io as sio
from statedict_io.archive import names_hash

PROCESS = pathlib.Path(__file__).with_name("other_system_process.py")
EVERYWHERE = ["save", "load", "patch", "leftovers", "convert", "stock", "case", "sync"]
SCENARIOS = {"windows": [*EVERYWHERE, "open_files", "drives"], "macos": [*EVERYWHERE, "sync_refused"]}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By system and scenario: the error, and the calls."""
    results = {}
    for system, scenarios in SCENARIOS.items():
        done = subprocess.run(
            [sys.executable, PROCESS, system, tmp_path_factory.mktemp(system), *scenarios],
            capture_output=True,
            text=True,
            env={**os.environ, "STATEDICT_IO_REQUIRE_NATIVE": ""},
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        results[system] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize(
    ("system", "scenario"), [(system, scenario) for system, scenarios in SCENARIOS.items() for scenario in scenarios]
)
def test_scenario(system, scenario, found):
    assert found[system][scenario]["error"] is None, found[system][scenario]["error"]


@pytest.mark.parametrize(
    ("scenario", "expected"), [("sync", ["F_FULLFSYNC"]), ("sync_refused", ["F_FULLFSYNC", "fsync"])]
)
def test_durable_on_macos_is_what_the_drive_has_written(scenario, expected, found):
    calls = found["macos"][scenario]["calls"]
    for of_directory in (False, True):
        assert [name for name, is_directory in calls if is_directory is of_directory] == expected


def test_durable_on_windows_is_a_flush_of_the_file(found):
    assert found["windows"]["sync"]["calls"] == [["fsync", False]]


@pytest.mark.parametrize(
    "name", ["module_state_dict", "many_small", "top_level_tensor", "containers", "payloads_like_descriptors"]
)
def test_a_torch_of_another_standard_library_is_asked_for_its_hash(name, tmp_path, monkeypatch):
    """The bytes are those of the installed torch.save, whichever way the number is found."""
    by_ours = names_hash._by_libstdcxx
    monkeypatch.setattr(names_hash, "_torch_counts_like_libstdcxx", lambda: False)
    monkeypatch.setattr(names_hash, "_by_libstdcxx", lambda names: by_ours(names) + 1)
    obj = CORPUS[name]()
    for directory in ("stock", "ours"):
        (tmp_path / directory).mkdir()
    torch.save(obj, tmp_path / "stock" / "model.pt")
    sio.save(obj, tmp_path / "ours" / "model.pt", backend="torch")
    assert_same_bytes(tmp_path / "stock" / "model.pt", tmp_path / "ours" / "model.pt")


@pytest.mark.parametrize("num_records", [0, 1, 12, 13, 14, 400])
def test_hash_of_names_by_either_way(num_records):
    names = ["data.pkl", "byteorder", *(f"data/{key}" for key in range(num_records)), "version"]
    assert names_hash._by_libstdcxx(names) == names_hash._by_torch(names) == names_hash.names_hash(names)
