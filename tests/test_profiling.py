"""What torch.profiler shows of saves and loads with the extension: which thread did what, and when."""

import collections
import threading

import pytest
import torch
from conftest import require_torch_module
from oracle import assert_same_bytes, two_directories
from torch.profiler import ProfilerActivity, profile

import statedict_io as sio

NBYTES = 24 << 20


@pytest.fixture(autouse=True)
def native():
    require_torch_module()


@pytest.fixture(scope="module")
def state():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(256, (NBYTES // 3,), dtype=torch.uint8, generator=generator) for name in "abc"}


def profiled(action, *arguments, **options):
    """The threads that recorded each step of a call: {step: [thread, ...]}."""
    with profile(activities=[ProfilerActivity.CPU]) as profiling:
        action(*arguments, **options)
    steps = collections.defaultdict(list)
    for event in profiling.events():
        if event.name.startswith("statedict_io::"):
            assert event.time_range.elapsed_us() >= 0
            steps[event.name.removeprefix("statedict_io::")].append(event.thread)
    return steps


def test_a_save_shows_its_steps_and_writes_the_same_bytes(tmp_path, state):
    reference, ours = two_directories(tmp_path)
    torch.save(state, reference / "model.pt")
    for durable in (True, False):
        steps = profiled(sio.save, state, ours / "model.pt", durable=durable)
        assert_same_bytes(reference / "model.pt", ours / "model.pt")
        copies = steps["copy_and_crc32"] or steps["crc32"]
        assert len(steps["preallocate"]) == 1
        assert len(copies) == len(steps["write"]) >= NBYTES // (8 << 20)


def test_a_load_shows_its_steps(tmp_path, state):
    path = tmp_path / "model.pt"
    sio.save(state, path)
    for verify in (True, False):
        steps = profiled(sio.load, path, verify=verify)
        assert len(set(steps["read"])) > 1, "its threads are not in the profile of the one that called"
        assert bool(steps["crc32"]) == verify


def test_a_refused_save_ends_its_steps(tmp_path, state):
    class Stop(Exception):
        pass

    def stop(done, total):
        raise Stop

    with profile(activities=[ProfilerActivity.CPU]) as profiling, pytest.raises(Stop):
        sio.save(state, tmp_path / "model.pt", progress=stop)
    with torch.profiler.record_function("after"):
        pass
    names = [event.name for event in profiling.events()]
    assert "statedict_io::write" in names and not list(tmp_path.iterdir())


def test_saves_of_other_threads_are_not_in_this_ones_profile(tmp_path, state):
    def save_elsewhere():
        saving = threading.Thread(target=sio.save, args=(state, tmp_path / "model.pt"))
        saving.start()
        saving.join()

    assert not profiled(save_elsewhere)
