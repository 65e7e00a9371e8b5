"""save_async from a device whose copies finish late. ../test_device.py runs this file too."""

import contextlib

import pytest
import torch
from async_states import chance_of, disturb, random_state
from conftest import require_native
from oracle import assert_same_bytes, first_difference, names_in, two_directories

import statedict_io as sio
from device_standin.checks import (  # noqa: F401 - fixtures
    DEVICES,
    LATE_US,
    MIB,
    late,
    mixed_state,
    random_bytes,
    reference_of,
    registered,
    small_tensors,
    standin,
)
from statedict_io.system import device_room

GIB = 1 << 30


@pytest.fixture(autouse=True)
def nothing_in_flight(standin):  # noqa: F811
    torch.standin.memory = (0, GIB)
    device_room._given_back.clear()
    yield
    torch.standin.memory = (0, GIB)
    sio.wait_all(60)


@pytest.fixture(params=["native, room", "native, no room", "torch"])
def way(request):
    """The options of a save that leaves the snapshot on the device, in pinned memory, in the Python backend's."""
    backend = request.param.split(",")[0]
    if backend == "native":
        require_native()
    torch.standin.memory = (GIB if request.param == "native, room" else 0, GIB)
    return {"backend": backend}


#: The Python backend's copies are torch's own, which wait for their stream.
of_the_extension = pytest.mark.parametrize("way", ["native, room", "native, no room"], indirect=True)


@contextlib.contextmanager
def on_streams_of_its_own():
    with contextlib.ExitStack() as streams:
        for device in DEVICES:
            streams.callback(torch.accelerator.set_stream, torch.accelerator.current_stream(device))
            torch.accelerator.set_stream(torch.Stream(device))
        torch.accelerator.set_device_index(0)
        yield
    torch.accelerator.set_device_index(0)


@pytest.mark.parametrize("rounds", [50, pytest.param(1000, marks=pytest.mark.long)])
def test_async_the_file_is_the_state_at_the_call(tmp_path, standin, way, rounds):  # noqa: F811
    ref, ours = two_directories(tmp_path)
    for number in range(rounds):
        chance = chance_of(number)
        state = random_state(chance, chance.choice(DEVICES), max_nbytes=MIB)
        state["on the host"] = random_state(chance)["w0"]
        on_device = [t for t in state.values() if isinstance(t, torch.Tensor) and t.device.type != "cpu"]
        late_values = [(tensor, chance.randint(0, 99)) for tensor in on_device if chance.random() < 0.7]
        for tensor, value in late_values:
            tensor.fill_(value)
        reference_of(state, ref / "model.pt")
        for tensor, _ in late_values:
            tensor.fill_(100)
        standin.drain()
        standin.delay_us = LATE_US
        before = on_streams_of_its_own() if chance.random() < 0.5 else contextlib.nullcontext()
        after = on_streams_of_its_own() if chance.random() < 0.5 else contextlib.nullcontext()
        with before:
            for tensor, value in late_values:
                tensor.fill_(value)  # has not begun when the call is made
            pending = sio.save_async(state, ours / "model.pt", durable=False, **way)
        del on_device, late_values
        with after:
            disturb(chance, state)
        pending.result(60)
        standin.drain()
        standin.delay_us = 0
        try:
            assert_same_bytes(ref / "model.pt", ours / "model.pt")
        except AssertionError as e:
            raise AssertionError(f"round {number}: {e}") from None
    assert names_in(ours) == ["model.pt"]


def test_async_same_bytes(tmp_path, standin, way):  # noqa: F811
    ref, ours = two_directories(tmp_path)
    state = mixed_state(big_nbytes=20 * MIB + 13)
    reference_of(state, ref / "model.pt")
    with late(standin):
        sio.save_async(state, ours / "model.pt", **way).result()
    assert_same_bytes(ref / "model.pt", ours / "model.pt")


def save_behind_a_late_fill(standin, directory, **options):  # noqa: F811
    """As checks.py has it, and overwritten again on another stream right after the call."""
    tensors = {device: [torch.zeros(9 * MIB, dtype=torch.uint8).to(device)] for device in DEVICES}
    tensors["standin:0"] += small_tensors(20, "standin:0").values()
    every = [tensor for of_device in tensors.values() for tensor in of_device]
    ref, ours = two_directories(directory)
    reference_of({d: [torch.full_like(t, 7, device="cpu").to(d) for t in ts] for d, ts in tensors.items()},
                 ref / "model.pt")  # fmt: skip
    standin.drain()
    with late(standin, 20_000):
        for tensor in every:
            tensor.fill_(7)
        standin.delay_us = LATE_US
        pending = sio.save_async(tensors, ours / "model.pt", durable=False, **options)
        standin.delay_us = 0
        with on_streams_of_its_own():
            for tensor in every:
                tensor.fill_(9)
        pending.result()
    return ref / "model.pt", ours / "model.pt"


def test_async_waits_for_the_current_stream_and_holds_off_every_other(tmp_path, standin, way):  # noqa: F811
    assert_same_bytes(*save_behind_a_late_fill(standin, tmp_path, **way))


def test_async_without_waiting_for_events_the_bytes_differ(tmp_path, standin):  # noqa: F811
    require_native()
    torch.standin.memory = (GIB, GIB)
    standin.lose_event_synchronize = 1
    assert first_difference(*save_behind_a_late_fill(standin, tmp_path, backend="native")) is not None


@of_the_extension
def test_async_nothing_is_synchronised_device_wide(tmp_path, standin, way):  # noqa: F811
    state = mixed_state()
    standin.reset()
    with late(standin):
        sio.save_async(state, tmp_path / "model.pt", **way).result()
        assert standin.device_synchronizations == standin.stream_synchronizations == standin.blocking_copies == 0
        assert standin.host_copies_to_pageable == 0


def test_async_wait_snapshot_false(tmp_path, standin):  # noqa: F811
    """Returns at once; what follows on the same stream comes after the copy."""
    require_native()
    torch.standin.memory = (GIB, GIB)
    ref, ours = two_directories(tmp_path)
    state = [random_bytes(3 * MIB, seed).to(DEVICES[0]) for seed in range(3)] + list(
        small_tensors(30, DEVICES[0]).values()
    )
    reference_of(state, ref / "model.pt")
    with late(standin, 100_000):
        pending = sio.save_async(state, ours / "model.pt", backend="native", wait_snapshot=False)
        assert not pending.snapshot_done() and not pending.done()
        for tensor in state:
            tensor.fill_(1)
        del tensor, state
        standin.delay_us = 0
        pending.wait_snapshot()
        assert pending.snapshot_done()
        pending.result()
    assert pending.snapshot_done()
    assert_same_bytes(ref / "model.pt", ours / "model.pt")


# ---- room


def clones_made(standin, path, state, **options):  # noqa: F811
    """Whether the snapshot was left on the device."""
    standin.reset()
    sio.save_async(state, path, backend="native", durable=False, **options).result()
    return standin["allocations:0"] > 0


def test_async_room_is_measured_and_has_a_margin_and_a_cap(tmp_path, standin):  # noqa: F811
    require_native()
    path, state = tmp_path / "model.pt", [random_bytes(8 * MIB, 0).to("standin:0")]
    for free, options, room in [
        (80 * MIB, {}, True),
        (71 * MIB, {}, False),  # less a sixteenth of the total
        (71 * MIB, {"device_margin_nbytes": 60 * MIB}, True),
        (71 * MIB, {"device_margin_nbytes": 64 * MIB}, False),
        (80 * MIB, {"max_device_snapshot_nbytes": 8 * MIB}, True),
        (80 * MIB, {"max_device_snapshot_nbytes": 8 * MIB - 1}, False),
        (80 * MIB, {"max_device_snapshot_nbytes": 0}, False),
    ]:
        torch.standin.memory = (free, GIB)
        assert clones_made(standin, path, state, **options) is room, (free, options)


def test_async_the_cap_on_a_device_counts_saves_in_flight(tmp_path, standin):  # noqa: F811
    require_native()
    torch.standin.memory = (GIB, GIB)
    state = [random_bytes(8 * MIB, 0).to("standin:0")]
    first = sio.save_async(state, tmp_path / "a.pt", backend="native", max_bytes_per_second=4 * MIB)
    assert not clones_made(standin, tmp_path / "b.pt", state, max_device_snapshot_nbytes=15 * MIB)
    assert clones_made(standin, tmp_path / "b.pt", state, max_device_snapshot_nbytes=16 * MIB)
    assert not first.done()
    first.result()


def test_async_a_device_without_mem_get_info_has_no_room(tmp_path, standin, monkeypatch):  # noqa: F811
    require_native()
    monkeypatch.delattr(torch.standin, "mem_get_info")
    assert not clones_made(standin, tmp_path / "model.pt", [torch.ones(5).to("standin:0")])


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("max_snapshot_nbytes", [GIB, MIB])  # the latter: too little for the host to step in
def test_async_a_device_that_runs_out_of_memory(tmp_path, standin, nth, max_snapshot_nbytes):  # noqa: F811
    require_native()
    torch.standin.memory = (GIB, GIB)
    ref, ours = two_directories(tmp_path)
    state = [random_bytes(MIB, seed).to(device) for seed, device in enumerate(DEVICES)]
    state += small_tensors(10, DEVICES[0]).values()
    reference_of(state, ref / "model.pt")
    with late(standin):
        standin.fail_allocation = nth
        pending = sio.save_async(
            state, ours / "model.pt", backend="native", max_snapshot_nbytes=max_snapshot_nbytes,
            max_bytes_per_second=4 * MIB,  # half a second to look whether it is done
        )  # fmt: skip
        assert standin.fail_allocation == 0 and pending.done() <= (max_snapshot_nbytes == MIB)
        for tensor in state:
            tensor.fill_(1)
        pending.result()
    assert_same_bytes(ref / "model.pt", ours / "model.pt")


@of_the_extension
@pytest.mark.parametrize("setting", ["fail_host_copy", "fail_event_synchronize"])
def test_async_a_failing_device_is_reported_and_leaves_the_old_file(tmp_path, standin, way, setting):  # noqa: F811
    target = tmp_path / "model.pt"
    target.write_bytes(b"old")
    state = [random_bytes(9 * MIB, 0).to("standin:0")]
    with late(standin, 5000):
        setattr(standin, setting, 1)
        with pytest.raises(RuntimeError, match="standin: the "):
            sio.save_async(state, target, **way).result()
        assert standin.host_copies_in_flight == 0
    assert target.read_bytes() == b"old" and names_in(tmp_path) == ["model.pt"]
    sio.save_async(state, target, **way).result()


@of_the_extension
def test_async_later_saves_allocate_nothing(tmp_path, standin, way):  # noqa: F811
    sio.release_buffers()
    state = [random_bytes(20 * MIB, 0).to("standin:0"), random_bytes(20 * MIB, 1)]
    with late(standin, 20_000):
        sio.save_async(state, tmp_path / "model.pt", **way).result()
    from statedict_io import _core

    pool, pinned = _core.snapshot_pool_nbytes(), standin.pinned_allocations
    with late(standin):
        for _ in range(3):
            sio.save_async(state, tmp_path / "model.pt", **way).result()
    assert (_core.snapshot_pool_nbytes(), standin.pinned_allocations) == (pool, pinned)
    sio.release_buffers()
    assert _core.snapshot_pool_nbytes() == 0
