"""Saving from a device whose copies finish late. ../test_device.py runs this file, in a process of its own."""

import concurrent.futures
import contextlib
import gc
import io
import itertools
import os

import pytest
import torch
from conftest import promised, require_native, require_torch_module
from oracle import assert_same_bytes, assert_same_file, first_difference, names_in, two_directories
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import device_standin
import statedict_io as sio

MIB = 1 << 20
LATE_US = 300
DEVICES = ["standin:0", "standin:1"]


@pytest.fixture(scope="session")
def registered():
    if device_standin.compiler() is None:
        if promised("STATEDICT_IO_REQUIRE_NATIVE"):
            pytest.fail("STATEDICT_IO_REQUIRE_NATIVE=1, but there is no C++ compiler to build the stand-in with")
        pytest.skip("no C++ compiler to build the stand-in with")
    return device_standin.register()


@pytest.fixture(autouse=True)
def standin(registered):
    """The stand-in with nothing queued, every counter at 0 and no delay; no setting outlives the test."""
    gc.collect()
    registered.reset()
    yield registered
    registered.reset()


@pytest.fixture
def native_slots():
    """The slots that the native backend has allocated so far, as a callable; the next save finds none idle."""
    require_native()
    from statedict_io import _core

    _core.release_buffers()
    yield _core.testing.num_slots_allocated
    _core.release_buffers()


def random_bytes(nbytes, seed):
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def small_tensors(count, device, nbytes=1024):
    """`count` tensors, each a storage of its own."""
    return {f"w{i}": rows.clone().to(device) for i, rows in enumerate(random_bytes(count * nbytes, 0).view(count, -1))}


def mixed_state(cpu=True, big_nbytes=9 * MIB + 13):
    """Every size class on both devices: empty, batched, single copies, more than a region; views and tied storages."""
    state = {}
    for seed, device in enumerate(DEVICES):
        big = random_bytes(big_nbytes, seed).to(device)
        medium = random_bytes(300 << 10, seed + 2).view(torch.bfloat16).to(device)
        state[device] = {
            "big": big,
            "view": big[5:17],
            "bf16": medium,
            "transposed": medium.view(300, -1).mT,
            "fp32": torch.arange(1000.0).to(device),
            "empty": torch.empty(0, device=device),
            "scalar": torch.tensor(7.5).to(device),
            "parameter": torch.nn.Parameter(torch.arange(9.0).to(device)),
            "storage": torch.arange(11.0).to(device).untyped_storage(),
            "small": small_tensors(40, device),
            "few and then medium": [torch.full((3,), 2.0).to(device), random_bytes(200 << 10, 9).to(device)],
        }
        if cpu:
            state[f"cpu {seed}"] = {"big": random_bytes(9 * MIB, seed + 5), "small": torch.arange(5)}
    return state


def reference_of(obj, path):
    """torch.save's bytes, in a file named like `path`."""
    path.parent.mkdir(exist_ok=True)
    torch.save(obj, path)
    return path


@contextlib.contextmanager
def late(standin, delay_us=LATE_US):
    standin.drain()
    standin.delay_us = delay_us
    try:
        yield
    finally:
        standin.drain()
        standin.delay_us = 0


# ---- the bytes of torch.save


@pytest.mark.parametrize("durable", [True, False])
def test_same_bytes_as_torch_save(tmp_path, backend, standin, durable):
    state = mixed_state(big_nbytes=20 * MIB + 13)
    with late(standin):
        assert_same_file(tmp_path, state, backend, load=False, durable=(durable,))
    loaded = torch.load(tmp_path / "ours" / "model.pt", map_location="cpu")
    assert torch.equal(loaded["standin:1"]["big"], state["standin:1"]["big"].cpu())
    assert torch.load(tmp_path / "ours" / "model.pt")["standin:1"]["big"].device == torch.device("standin:1")


@pytest.mark.parametrize("durable", [True, False])
def test_same_safetensors(tmp_path, backend, standin, durable):
    state = mixed_state(big_nbytes=20 * MIB + 13)
    kept = ("big", "bf16", "fp32", "empty", "scalar", "parameter")
    state = {f"{place}.{name}": of[name] for place, of in state.items() for name in kept if name in of}
    whole = torch.arange(100_000).to(DEVICES[0])
    state |= {"first": whole[:7], "second": whole[7:], **small_tensors(300, DEVICES[1])}
    save_file({name: tensor.cpu() for name, tensor in state.items()}, tmp_path / "ref")
    with late(standin):
        sio.save_safetensors(state, tmp_path / "ours", backend=backend, durable=durable)
    assert_same_bytes(tmp_path / "ref", tmp_path / "ours")


def test_same_bytes_into_a_file_object(backend, standin):
    state = mixed_state()
    ref, ours = io.BytesIO(), io.BytesIO()
    torch.save(state, ref)
    with late(standin):
        sio.save(state, ours, backend=backend)
    assert ours.getvalue() == ref.getvalue()


def test_thousands_of_small_tensors(tmp_path, backend, standin):
    state = {device: small_tensors(3000, device) for device in DEVICES}
    ref, ours = two_directories(tmp_path)
    reference_of(state, ref / "model.pt")
    with late(standin, 100 if backend == "native" else 0):
        sio.save(state, ours / "model.pt", backend=backend)
    assert_same_bytes(ref / "model.pt", ours / "model.pt")


@pytest.mark.parametrize("count", [1, 7, 8, 9])
@pytest.mark.parametrize("nbytes", [1, (128 << 10) - 1, 128 << 10])
def test_around_the_limits_of_batching(tmp_path, standin, count, nbytes):
    require_native()
    with late(standin):
        assert_same_file(tmp_path, small_tensors(count, "standin:0", nbytes), "native", load=False)


def test_crc_off(tmp_path, backend, standin):
    state = mixed_state()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with late(standin):
            assert_same_file(tmp_path, state, backend, load=False, durable=(False,))
    finally:
        torch.serialization.set_crc32_options(before)


def test_two_threads_save_at_once(tmp_path, backend, standin):
    ref, ours = two_directories(tmp_path)
    states = [mixed_state(), {"other": [random_bytes(9 * MIB, 77).to(device) for device in DEVICES]}]
    for i, state in enumerate(states):
        reference_of(state, ref / f"{i}.pt")
    with late(standin), concurrent.futures.ThreadPoolExecutor() as pool:
        saves = [pool.submit(sio.save, state, ours / f"{i}.pt", backend=backend) for i, state in enumerate(states)]
        for save in saves:
            save.result()
    for i in range(len(states)):
        assert_same_bytes(ref / f"{i}.pt", ours / f"{i}.pt")


# ---- work that still runs when the save is called


def save_behind_a_late_fill(standin, directory, backend, stream=None):
    """Saves tensors whose values the device has yet to write; returns that file and what it has to be."""
    tensors = {device: [torch.zeros(9 * MIB, dtype=torch.uint8).to(device)] for device in DEVICES}
    tensors["standin:0"] += small_tensors(20, "standin:0").values()
    expected = {d: [torch.full_like(t, 7, device="cpu").to(d) for t in ts] for d, ts in tensors.items()}
    ref, ours = two_directories(directory)
    reference_of(expected, ref / "model.pt")
    standin.drain()
    with late(standin, 20_000), stream or contextlib.nullcontext():
        for tensor in itertools.chain(*tensors.values()):
            tensor.fill_(7)
        standin.delay_us = LATE_US
        sio.save(tensors, ours / "model.pt", backend=backend)
    return ref / "model.pt", ours / "model.pt"


def test_waits_for_the_current_stream(tmp_path, backend, standin):
    assert_same_bytes(*save_behind_a_late_fill(standin, tmp_path, backend))


def test_waits_for_a_current_stream_other_than_the_default(tmp_path, backend, standin):
    streams = contextlib.ExitStack()
    for device in DEVICES:
        before, stream = torch.accelerator.current_stream(device), torch.Stream(device)
        assert stream != before
        streams.callback(torch.accelerator.set_stream, before)
        torch.accelerator.set_stream(stream)
    torch.accelerator.set_device_index(0)
    assert_same_bytes(*save_behind_a_late_fill(standin, tmp_path, backend, streams))


def test_what_follows_the_save_does_not_reach_the_file(tmp_path, backend, standin):
    tensor = random_bytes(20 * MIB, 0).to("standin:0")
    ref, ours = two_directories(tmp_path)
    reference_of(tensor, ref / "model.pt")
    with late(standin):
        sio.save(tensor, ours / "model.pt", backend=backend, durable=False)
        tensor.fill_(0)
    assert_same_bytes(ref / "model.pt", ours / "model.pt")


# ---- the stand-in can tell: without a wait the bytes are wrong


def test_without_waiting_for_events_the_bytes_differ(tmp_path, standin):
    require_native()
    state = mixed_state()
    ref, ours = two_directories(tmp_path)
    reference_of(state, ref / "model.pt")
    with late(standin, 20_000):
        standin.lose_event_synchronize = 1
        sio.save(state, ours / "model.pt", backend="native")
    assert first_difference(ref / "model.pt", ours / "model.pt") is not None


def test_without_order_among_streams_the_bytes_differ(tmp_path, standin):
    require_native()
    standin.lose_event_block = 1
    assert first_difference(*save_behind_a_late_fill(standin, tmp_path, "native")) is not None


# ---- what a save costs


def test_small_tensors_are_batched_and_not_waited_for_one_by_one(tmp_path, standin):
    require_native()
    state = small_tensors(5000, "standin:0") | small_tensors(5000, "standin:1")
    standin.reset()
    with late(standin):
        sio.save(state, tmp_path / "model.pt", backend="native")
    assert 0 < standin.event_synchronizations < 50
    assert 0 < standin.host_copies < 50
    assert standin.gathers < 50
    assert standin["commands:0"] + standin["commands:1"] < 100
    assert standin["events_recorded:0"] + standin["events_recorded:1"] < 50
    assert standin.stream_synchronizations == standin.device_synchronizations == standin.blocking_copies == 0
    assert standin.host_copy_nbytes == 5000 * 1024


def test_big_tensors_are_copied_once_into_pinned_memory(tmp_path, standin):
    require_native()
    state = [random_bytes(20 * MIB, seed).to(device) for seed, device in enumerate(DEVICES)]
    standin.reset()
    with late(standin):
        sio.save(state, tmp_path / "model.pt", backend="native")
    assert standin.host_copy_nbytes == 40 * MIB
    assert standin.host_copies <= 10
    assert standin.host_copies_to_pageable == 0
    assert standin.stream_synchronizations == standin.device_synchronizations == standin.blocking_copies == 0
    assert standin["allocations:0"] == standin["allocations:1"] == 0


def test_other_devices_are_left_alone(tmp_path, standin):
    require_native()
    state = {"big": random_bytes(20 * MIB, 0).to("standin:1"), "small": small_tensors(100, "standin:1")}
    assert torch.accelerator.current_device_index() == 0
    standin.reset()
    with late(standin):
        sio.save(state, tmp_path / "model.pt", backend="native")
    for counter in ("commands", "allocations", "streams_taken", "events_recorded"):
        assert standin[f"{counter}:0"] == 0, counter
        assert standin[f"{counter}:1"] > 0, counter
    assert torch.accelerator.current_device_index() == 0


def test_current_device_and_streams_stay(tmp_path, backend, standin):
    streams = [torch.accelerator.current_stream(device) for device in DEVICES]
    state = [torch.arange(3.0).to(device) for device in DEVICES]  # one region: saved in the calling thread
    sio.save(state, tmp_path / "model.pt", backend=backend)
    sio.save(state, io.BytesIO(), backend=backend)
    assert torch.accelerator.current_device_index() == 0
    assert [torch.accelerator.current_stream(device) for device in DEVICES] == streams


@pytest.mark.parametrize("batched", [False, True])
def test_later_saves_allocate_no_slots(tmp_path, standin, native_slots, batched):
    if batched:  # a second slot for each region that is being filled
        state = list(small_tensors(20 * 128, "standin:0", nbytes=64 << 10).values())
    else:
        state = [random_bytes(8 * MIB, seed).to("standin:0") for seed in range(20)]
    before = native_slots()
    with late(standin, 1000):
        # How many workers have a slot at once is chance. One that a save did not give back would be missed in the next.
        for _ in range(10):
            sio.save(state, tmp_path / "model.pt", backend="native")
    assert before < native_slots() <= before + 16
    assert standin.pinned_allocations == native_slots() - before


# ---- failures


@pytest.mark.parametrize("setting", ["fail_host_copy", "fail_event_synchronize"])
@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("to_path", [True, False])
def test_a_failing_device_is_reported_and_leaves_the_old_file(tmp_path, standin, setting, nth, to_path):
    require_native()
    state = mixed_state(cpu=False)
    ref, ours = two_directories(tmp_path)
    reference_of(state, ref / "model.pt")
    target = ours / "model.pt"
    target.write_bytes(b"old")
    with late(standin, 5000):
        setattr(standin, setting, nth)
        with pytest.raises(RuntimeError, match="standin: the "):
            sio.save(state, target if to_path else io.BytesIO(), backend="native")
        # The slots belong to the next save: nothing may still be on its way into them.
        assert standin.host_copies_in_flight == 0
        assert getattr(standin, setting) == 0
    assert target.read_bytes() == b"old"
    assert names_in(ours) == ["model.pt"]
    with late(standin):
        sio.save(state, target, backend="native")
    assert_same_bytes(ref / "model.pt", target)


def test_a_failed_save_does_not_write_into_the_next(tmp_path, standin, native_slots):
    """The copies that were queued before the one that failed land where the next save assembles its region."""
    failing = [random_bytes(size, 1).to("standin:0") for size in (300 << 10, 2 * MIB, 200 << 10)]
    state = [random_bytes(size, 2).to("standin:0") for size in (3 * MIB // 2, 200 << 10)]
    ref, ours = two_directories(tmp_path)
    reference_of(state, ref / "model.pt")
    with late(standin, 100_000):
        standin.fail_host_copy = 3
        with pytest.raises(RuntimeError, match="standin: the copy was refused"):
            sio.save(failing, ours / "model.pt", backend="native")
        standin.delay_us = 110_000
        sio.save(state, ours / "model.pt", backend="native")
    assert_same_bytes(ref / "model.pt", ours / "model.pt")


# ---- what a profile shows


def profiled_steps(obj, path):
    """(name, thread, start, end) of each step of a save of ``obj``, in microseconds."""
    with profile(activities=[ProfilerActivity.CPU]) as profiling:
        sio.save(obj, path, backend="native")
    steps = [event for event in profiling.events() if event.name.startswith("statedict_io::")]
    return [(step.name, step.thread, step.time_range.start, step.time_range.end) for step in steps]


def at_once(some, others):
    """Pairs of steps of different threads of which one began while the other was in progress."""
    return [(a, b) for a in some for b in others if a[1] != b[1] and a[2] < b[3] and b[2] < a[3]]


def test_copies_of_different_regions_overlap_each_other_and_what_follows_them(tmp_path, standin):
    require_torch_module()  # which records steps
    state = {"w": random_bytes(96 * MIB, 1).to("standin:0")}
    ref, ours = two_directories(tmp_path)
    reference_of(state, ref / "model.pt")
    with late(standin, 20_000):
        steps = profiled_steps(state, ours / "model.pt")
    assert_same_bytes(ref / "model.pt", ours / "model.pt")
    copies, checksums, writes = (
        [step for step in steps if step[0] == f"statedict_io::{name}"] for name in ("device_to_host", "crc32", "write")
    )
    assert len(copies) == len(checksums) == len(writes) == 13
    for thread in {step[1] for step in copies}:
        fills = sorted((step for step in copies + checksums if step[1] == thread), key=lambda step: step[2])
        assert [step in copies for step in fills] == [True, False] * (len(fills) // 2)
        assert all(one[3] <= next_one[2] for one, next_one in itertools.pairwise(fills))
    assert at_once(copies, copies) and at_once(copies, checksums + writes)


# ---- the state of the calling thread


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


AMBIENT = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "device context": lambda: torch.device("meta"),
    "dispatch mode": Recorder,
    "profile": lambda: profile(activities=[ProfilerActivity.CPU]),
}


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("small", [True, False])
def test_ambient_modes(tmp_path, backend, standin, ambient, small):
    # What fits one region is saved in the calling thread, where the mode is.
    state = {device: small_tensors(20, device) for device in DEVICES} if small else mixed_state()
    ref, ours = two_directories(tmp_path)
    reference_of(state, ref / "model.pt")
    stream = io.BytesIO()
    with late(standin), AMBIENT[ambient]() as mode:
        sio.save(state, ours / "model.pt", backend=backend)
        sio.save(state, stream, backend=backend)
        if ambient == "dispatch mode" and backend == "native":
            assert not {"empty", "set_", "cat", "copy_", "_copy_from", "from_blob"} & set(mode.seen)
    assert_same_bytes(ref / "model.pt", ours / "model.pt")
    torch.save(state, expected := io.BytesIO())
    assert stream.getvalue() == expected.getvalue()


def test_saving_what_inference_mode_made(tmp_path, backend, standin):
    with torch.inference_mode():
        state = mixed_state(cpu=False)
    with late(standin):
        assert_same_file(tmp_path, state, backend, load=False, durable=(False,))


@pytest.mark.parametrize("pinned_memory", [0, 2], ids=["none", "not page-aligned"])
def test_pinned_memory_that_cannot_be_used(tmp_path, standin, native_slots, pinned_memory):
    standin.pinned_memory = pinned_memory
    state = mixed_state()
    with late(standin):
        assert_same_file(tmp_path, state, "native", load=False)
    assert standin.host_copies == standin.host_copies_to_pageable > 0
    before = native_slots()
    sio.save(state, os.devnull, backend="native")
    assert native_slots() == before


@pytest.mark.parametrize(("count", "gathers"), [(1, 0), (7, 0), (8, 1)])
def test_a_few_small_tensors_are_copied_one_by_one(tmp_path, standin, count, gathers):
    require_native()
    state = small_tensors(count, DEVICES[0])
    standin.reset()
    sio.save(state, tmp_path / "model.pt", backend="native")
    assert standin.gathers == gathers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", ["save", "dcp.save"])
def test_a_device_without_streams_is_copied_first(tmp_path, standin, entry):
    require_native()
    import torch.distributed.checkpoint as dcp

    from statedict_io.dcp import SingleFileWriter

    state = {f"large{i}": random_bytes(5 * MIB + 3, i) for i in range(3)} | small_tensors(40, "cpu")
    on_device = {name: tensor.to(DEVICES[i % 2]) for i, (name, tensor) in enumerate(state.items())}
    expected, ours = two_directories(tmp_path)
    torch.save(state if entry == "dcp.save" else on_device, expected / "model.pt")
    standin.no_streams = 1
    if entry == "save":
        sio.save(on_device, ours / "model.pt", backend="native")
    else:
        writer = SingleFileWriter(ours / "model.pt", backend="native")
        dcp.save(on_device, storage_writer=writer, no_dist=True)
    assert (ours / "model.pt").read_bytes() == (expected / "model.pt").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_shards_of_many_ranks_come_from_the_device(tmp_path, standin):
    """Rows, columns and small tensors, through torch.distributed.checkpoint."""
    require_native()
    import torch.distributed.checkpoint as dcp

    from statedict_io import backends
    from statedict_io.backends.protocol import Strip
    from statedict_io.dcp import SingleFileWriter

    state = {f"large{i}": random_bytes(5 * MIB + 3, i) for i in range(3)} | small_tensors(40, "cpu")
    expected, ours = two_directories(tmp_path)
    torch.save(state, expected / "model.pt")
    on_device = {name: tensor.to(DEVICES[i % 2]) for i, (name, tensor) in enumerate(state.items())}
    standin.delay_us = LATE_US
    dcp.save(on_device, storage_writer=SingleFileWriter(ours / "model.pt"), no_dist=True)
    assert (ours / "model.pt").read_bytes() == (expected / "model.pt").read_bytes()

    columns = random_bytes(3000 * 100, 9)
    path = tmp_path / "columns"
    path.write_bytes(bytes(3000 * 1000))
    strip = Strip(0, 0, 0, 100, 3000, 1000, 0)
    backends.choose("native").write_strips(
        str(path), [columns.to(DEVICES[0]).untyped_storage()], [strip], durable=True, compute_crc32=True, progress=None
    )
    written = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).view(3000, 1000)
    assert torch.equal(written[:, :100], columns.view(3000, 100)) and not written[:, 100:].any()
