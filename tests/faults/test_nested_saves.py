"""Nobody waits for himself: a save, or a wait, in the middle of a save of the same thread ends."""

import os
import pathlib
import threading

import pytest
import torch
import warm_process

import statedict_io as sio

PROCESS = pathlib.Path(__file__).with_name("nested_process.py")
PLACES = [
    "sync-pickling",
    "async-pickling",
    "sync-progress",
    "async-progress",
    "async-admission",
    "async-snapshot",
    "async-in_call",
    "async-thread_start",
    "async-third_thread",
]
SAVES = ["save", "fastsave", "patched", "async", "result", "full", "with"]


def run(place, entry, path, other, backend):
    ended = warm_process.run(PROCESS, place, entry, path, other, backend, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "entry",
    ["save", "result", "wait_all"]
    + [pytest.param(e, marks=pytest.mark.long) for e in [*SAVES, "release_buffers"] if e not in ("save", "result")],
)
def test_the_call_that_began_last_stands(tmp_path, backend, place, entry):
    path = tmp_path / "model.pt"
    run(place, entry, path, path, backend)
    found = torch.load(path)
    value = found["value"] if isinstance(found, dict) else found[0]["value"]
    expected = 2 if entry in SAVES else 3 if "third" in place else 1
    assert value == expected
    assert [name for name in os.listdir(tmp_path) if not name.startswith("model.pt")] == []


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("entry", [pytest.param("result", marks=pytest.mark.long)])
def test_on_another_path_both_are_there(tmp_path, backend, place, entry):
    run(place, entry, tmp_path / "model.pt", tmp_path / "other.pt", backend)
    assert torch.load(tmp_path / "other.pt")["value"] == 2
    assert (tmp_path / "model.pt").exists()


def test_where_the_inner_save_fails_the_outer_one_is_committed(tmp_path, backend):
    path, failed = tmp_path / "model.pt", []

    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("cannot be pickled")

    def inner(*_):
        if not failed:
            with pytest.raises(RuntimeError, match="cannot be pickled"):
                sio.save([Unpicklable()], path, backend=backend)
            failed.append(1)

    sio.save_async({"value": 1}, path, backend=backend, progress=inner).result(60)
    assert failed and torch.load(path) == {"value": 1}


def test_its_own_result_in_a_progress_callback_is_an_error(tmp_path, backend):
    saves, ready, errors = [], threading.Event(), []

    def ask(*_):
        ready.wait(60)
        try:
            saves[0].result()
        except sio.StateDictIOError as e:
            errors.append(str(e))

    saves.append(sio.save_async({"value": 1}, tmp_path / "model.pt", backend=backend, progress=ask))
    ready.set()
    saves[0].result(60)
    assert errors and "model.pt" in errors[0]
