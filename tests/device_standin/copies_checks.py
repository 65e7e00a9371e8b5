"""Devices through torch's Python API. ../test_device.py runs this file, in a process of its own."""

import concurrent.futures
import contextlib
import ctypes
import random
import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode

from device_standin.async_checks import on_streams_of_its_own
from device_standin.checks import (  # noqa: F401 - fixtures
    AMBIENT,
    DEVICES,
    MIB,
    late,
    random_bytes,
    registered,
    standin,
)
from statedict_io.backends import device_copies

SLOT_NBYTES = 8 * MIB
KIB = 1 << 10
SIZES = [3, 0, MIB, 12345, 64, 200_003, 128 * KIB, 128 * KIB - 1, *[1000] * 40, 7, 4096, 300_000]


class Slot:
    """Pinned memory that holds what earlier users left in it."""

    def __init__(self, nbytes=SLOT_NBYTES):
        self.owner, self.address = device_copies.pinned(nbytes)
        self.fill(0xCC)

    def fill(self, value):
        ctypes.memset(self.address, value, self.owner.numel())

    def bytes(self, offset, nbytes):
        return ctypes.string_at(self.address + offset, nbytes)


def bytes_of(storage, offset=0, nbytes=None):
    host = storage.cpu()
    return ctypes.string_at(host.data_ptr() + offset, host.nbytes() - offset if nbytes is None else nbytes)


class Records:
    """Tensors of ``sizes`` bytes on the devices in turn, each fifth of them elsewhere: what a save copies from."""

    def __init__(self, sizes=SIZES, devices=DEVICES):
        self.slots = []  # kept: without a wait, copies are under way into them
        self.tensors = [random_bytes(nbytes + 5, i).to(devices[i % len(devices)]) for i, nbytes in enumerate(sizes)]
        self.expected = [bytes_of(tensor.untyped_storage(), 5) for tensor in self.tensors]
        self.records = [
            None if i % 5 == 4 else (tensor.untyped_storage(), 5, sizes[i]) for i, tensor in enumerate(self.tensors)
        ]

    def regions(self, nbytes):
        """The records one after another, cut into regions of so many bytes: pieces with offsets into a slot."""
        pieces, left = [], nbytes
        for record, placed in enumerate(self.records):
            offset = 0
            while placed is not None and offset < placed[2]:
                step = min(left, placed[2] - offset)
                pieces.append((record, offset, step, nbytes - left))
                offset, left = offset + step, left - step
                if left == 0:
                    yield pieces
                    pieces, left = [], nbytes
        yield pieces

    def assert_copied(self, source, region_nbytes=SLOT_NBYTES, with_bounce=True, num_threads=4):
        """Copies all of it, in several threads, each with a slot of its own; whether all bytes were right."""
        local = threading.local()

        def copy(pieces):
            if not hasattr(local, "slot"):
                local.slot, local.bounce = Slot(), Slot()
                self.slots += local.slot, local.bounce
            local.slot.fill(0xCC)
            at = [(record, offset, nbytes, local.slot.address + start) for record, offset, nbytes, start in pieces]
            source.copy(at, local.bounce.address if with_bounce else None)
            return all(
                local.slot.bytes(start, nbytes) == self.expected[record][offset : offset + nbytes]
                for record, offset, nbytes, start in pieces
            )

        with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
            assert all(pool.map(copy, list(self.regions(region_nbytes))))


# ---- out of devices


@pytest.mark.parametrize("region_nbytes", [64 * KIB, SLOT_NBYTES])
@pytest.mark.parametrize("with_bounce", [True, False])
def test_copies_out_of_devices_in_several_threads(standin, region_nbytes, with_bounce):  # noqa: F811
    records = Records()
    standin.reset()
    with late(standin):
        records.assert_copied(device_copies.source(records.records), region_nbytes, with_bounce)
    assert (standin.gathers > 0) is with_bounce
    assert standin.host_copies_to_pageable == standin.blocking_copies == standin.host_copies_in_flight == 0
    assert standin.stream_synchronizations == standin.device_synchronizations == 0


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("nbytes", [1, 128 * KIB - 1, 128 * KIB])
def test_copies_around_the_limits_of_gathering(standin, count, nbytes):  # noqa: F811
    records = Records([nbytes] * (count + count // 4), ["standin:0"])
    standin.reset()
    with late(standin):
        records.assert_copied(device_copies.source(records.records), num_threads=1)
    num_copied = sum(record is not None for record in records.records)
    gathers = nbytes < 128 * KIB
    assert standin.gathers == gathers and standin.host_copies == (1 if gathers else num_copied)


def late_fill(standin, streams=None):  # noqa: F811
    """The records of a source that is made while the device has yet to write their values, and that source."""
    records = Records([300 * KIB] * 4 + [1000] * 30)
    records.expected = [b"\x07" * (len(expected)) for expected in records.expected]
    standin.drain()
    standin.delay_us = 5000
    with streams or contextlib.nullcontext():
        for tensor in records.tensors:
            tensor.fill_(7)
        standin.delay_us = 0
        return records, device_copies.source(records.records)


@pytest.mark.parametrize("streams", [contextlib.nullcontext, on_streams_of_its_own])
def test_copies_come_after_what_the_current_streams_had_queued(standin, streams):  # noqa: F811
    records, source = late_fill(standin, streams())
    records.assert_copied(source)


def test_copies_without_order_among_streams_differ(standin):  # noqa: F811
    standin.lose_event_block = 1
    records, source = late_fill(standin)
    with pytest.raises(AssertionError):
        records.assert_copied(source)


def test_copies_without_waiting_for_events_differ(standin):  # noqa: F811
    records = Records()
    standin.drain()
    standin.lose_event_synchronize, standin.delay_us = 1, 20_000
    with pytest.raises(AssertionError):
        records.assert_copied(device_copies.source(records.records))
    standin.drain()


@pytest.mark.parametrize("setting", ["fail_host_copy", "fail_event_synchronize"])
@pytest.mark.parametrize("nth", [1, 3])
def test_copies_that_fail_are_reported_and_leave_the_slots_alone(standin, setting, nth):  # noqa: F811
    records = Records([300 * KIB] * 8 + [1000] * 30, ["standin:0"])
    source, slot, bounce = device_copies.source(records.records), Slot(), Slot()
    (pieces,) = records.regions(SLOT_NBYTES)
    at = [(record, offset, nbytes, slot.address + start) for record, offset, nbytes, start in pieces]
    with late(standin, 50_000):
        setattr(standin, setting, nth)
        for _ in range(3 if setting == "fail_event_synchronize" else 1):
            try:
                source.copy(at, bounce.address)
            except RuntimeError as e:
                assert "standin: the " in str(e)
                break
        else:
            pytest.fail("the failure was not reported")
        assert standin.host_copies_in_flight == 0 and getattr(standin, setting) == 0
    records.assert_copied(source)


def test_copies_without_room_to_gather_in(standin):  # noqa: F811
    records = Records([1000] * 30, ["standin:1"])
    source = device_copies.source(records.records)
    standin.reset()
    standin.fail_allocation = 1
    records.assert_copied(source, num_threads=1)
    assert standin.fail_allocation == 0 and standin.host_copies == 24


def test_copies_let_other_threads_run_while_they_wait(standin):  # noqa: F811
    records = Records([300 * KIB] * 8, ["standin:0"])
    source, slot = device_copies.source(records.records), Slot()
    at = [(record, *rest, slot.address + start) for record, *rest, start in next(records.regions(SLOT_NBYTES))]
    with late(standin, 50_000):
        copying = threading.Thread(target=source.copy, args=(at, None))
        copying.start()
        seen = False
        while copying.is_alive():
            seen = seen or standin.host_copies_in_flight == len(at)
        copying.join()
    assert seen


def test_copies_leave_other_devices_alone(standin):  # noqa: F811
    records = Records([300 * KIB] * 3 + [1000] * 30, ["standin:1"])
    standin.reset()
    with late(standin):
        records.assert_copied(device_copies.source(records.records))
    for counter in ("commands", "allocations", "streams_taken", "events_recorded"):
        assert standin[f"{counter}:0"] == 0 < standin[f"{counter}:1"], counter


class Functions(TorchFunctionMode):
    """Sees every function of torch that is called in its thread."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("ambient", [*AMBIENT, "function mode", "default device"])
def test_copies_in_whatever_mode(standin, ambient):  # noqa: F811
    """In the calling thread, where the mode is."""
    records, slot, bounce = Records(), Slot(), Slot()
    (pieces,) = records.regions(SLOT_NBYTES)
    streams = [torch.accelerator.current_stream(device) for device in DEVICES]
    at = [(record, offset, nbytes, slot.address + start) for record, offset, nbytes, start in pieces]
    modes = {"function mode": Functions, "default device": lambda: torch.device("standin:1"), **AMBIENT}
    with late(standin), modes[ambient]() as mode:
        device_copies.source(records.records).copy(at, bounce.address)
        clones = device_copies.clones(records.records)
        destination = device_copies.destination("standin:1", [5])
        destination.copy([(0, 0, 5, slot.address)]).wait()
        own = device_copies.pinned(4096)
        if ambient in {"dispatch mode", "function mode"}:
            assert not {"empty", "set_", "cat", "copy_", "_copy_from", "frombuffer"} & set(mode.seen)
    assert own is not None and own[0].device.type == "cpu"
    for record, offset, nbytes, start in pieces:
        assert slot.bytes(start, nbytes) == records.expected[record][offset : offset + nbytes]
    assert [record is None for record in clones.records].count(False) > 30
    assert bytes_of(destination.storages()[0]) == slot.bytes(0, 5)
    assert torch.accelerator.current_device_index() == 0
    assert [torch.accelerator.current_stream(device) for device in DEVICES] == streams


def test_devices_without_streams_are_refused(standin):  # noqa: F811
    records = Records([10], ["standin:0"]).records
    standin.no_streams = 1
    with pytest.raises(RuntimeError, match="there are no streams"):
        device_copies.source(records)
    with pytest.raises(RuntimeError):
        device_copies.source([(torch.empty(3, device="meta").untyped_storage(), 0, 12)])


@pytest.mark.parametrize("kind", [0, 2], ids=["none", "not page-aligned"])
def test_pinned_memory_that_cannot_be_had(standin, kind):  # noqa: F811
    standin.pinned_memory = kind
    assert device_copies.pinned(SLOT_NBYTES) is None


def test_pinned_memory_is_pinned_until_its_owner_is_gone(standin):  # noqa: F811
    owner, address = device_copies.pinned(SLOT_NBYTES)
    assert owner.is_pinned() and owner.data_ptr() == address and address % 4096 == 0
    ctypes.memset(address, 1, SLOT_NBYTES)


# ---- onto devices


def fill(destination, payloads, num_threads=4, piece_nbytes=100_000):
    """Copies ``payloads`` there in pieces, in several threads that have two slots each; returns the slots."""
    pieces = [
        (request, offset, payload[offset : offset + piece_nbytes])
        for request, payload in enumerate(payloads)
        for offset in range(0, len(payload), piece_nbytes)
    ]
    random.Random(0).shuffle(pieces)

    kept = []  # without a wait, copies are under way out of them

    def work(mine):
        slots, under_way = [Slot(MIB), Slot(MIB)], [None, None]
        kept.extend(slots)
        for number in range(0, len(mine), 3):
            turn = number // 3 % 2
            if under_way[turn] is not None:
                under_way[turn].wait()
            slots[turn].fill(0xDD)
            start, queued = 0, []
            for request, offset, payload in mine[number : number + 3]:
                ctypes.memmove(slots[turn].address + start, payload, len(payload))
                queued.append((request, offset, len(payload), slots[turn].address + start))
                start += len(payload)
            under_way[turn] = destination.copy(queued)
        for copies in under_way:
            if copies is not None:
                copies.wait()

    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, [pieces[i::num_threads] for i in range(num_threads)]))
    return kept


def payloads_of(sizes=SIZES):
    return [random.Random(i).randbytes(nbytes) for i, nbytes in enumerate(sizes)]


def test_copies_onto_a_device_in_several_threads(standin):  # noqa: F811
    payloads = payloads_of([*SIZES, 3 * MIB])
    standin.reset()
    with late(standin):
        destination = device_copies.destination("standin:1", [*map(len, payloads)])
        fill(destination, payloads)
    assert standin.device_copies_in_flight == standin.blocking_copies == 0 < standin.device_copies
    assert standin.most_device_copies_in_flight > 1
    assert standin.stream_synchronizations == standin.device_synchronizations == standin["streams_taken:0"] == 0
    assert [*map(bytes_of, destination.storages())] == payloads
    assert {storage.device for storage in destination.storages() if storage.nbytes()} == {torch.device("standin:1")}


def test_copies_onto_a_device_without_waiting_for_events_differ(standin):  # noqa: F811
    payloads = payloads_of([3 * MIB])
    destination = device_copies.destination("standin:1", [3 * MIB])
    standin.lose_event_synchronize, standin.delay_us = 1, 20_000
    slots = fill(destination, payloads)
    standin.drain()
    del slots
    assert [*map(bytes_of, destination.storages())] != payloads


@pytest.mark.parametrize("lose", [0, 1])
def test_copies_come_after_what_the_memory_was_used_for(standin, lose):  # noqa: F811
    payloads = payloads_of([3 * MIB])
    old = torch.empty(3 * MIB, dtype=torch.uint8, device="standin:0")
    standin.drain()
    standin.delay_us = 200_000
    old.fill_(1)
    standin.delay_us = 0
    del old
    standin.lose_event_block = lose
    destination = device_copies.destination("standin:0", [3 * MIB])
    fill(destination, payloads)
    standin.drain()
    assert ([*map(bytes_of, destination.storages())] == payloads) is (lose == 0)


def test_copies_that_are_dropped_have_landed(standin):  # noqa: F811
    destination, slot = device_copies.destination("standin:0", [300_000]), Slot()
    slot.fill(5)
    with late(standin, 300_000):
        copies = destination.copy([(0, 0, 300_000, slot.address)])
        assert standin.device_copies_in_flight == 1
        del copies
        assert standin.device_copies_in_flight == 0
        slot.fill(6)
    assert set(bytes_of(destination.storages()[0])) == {5}


@pytest.mark.parametrize("setting", ["fail_device_copy", "fail_event_synchronize"])
def test_copies_onto_a_device_that_fails(standin, setting):  # noqa: F811
    destination, slot = device_copies.destination("standin:0", [MIB] * 4), Slot()
    at = [(i, 0, MIB, slot.address + i * MIB) for i in range(4)]
    slot.fill(5)
    with late(standin, 100_000):
        setattr(standin, setting, 1 if setting == "fail_event_synchronize" else 3)
        with pytest.raises(RuntimeError, match="standin: the "):
            destination.copy(at).wait()
        assert standin.device_copies_in_flight == 0
        slot.fill(6)
        destination.copy(at).wait()
    assert {byte for storage in destination.storages() for byte in bytes_of(storage)} == {6}


@pytest.mark.parametrize(("setting", "value"), [("no_streams", 1), ("fail_allocation", 2)])
def test_devices_that_cannot_take_copies(standin, setting, value):  # noqa: F811
    setattr(standin, setting, value)
    assert device_copies.destination("standin:0", [MIB, MIB]) is None


@pytest.mark.parametrize("device", ["cuda", "cpu", "meta"])
def test_other_devices_are_left_to_torch(standin, device):  # noqa: F811
    if torch.get_device_module(device).is_available() if device == "cuda" else False:
        pytest.skip("there is a GPU")
    assert device_copies.destination(device, [3]) is None


def test_a_device_without_a_number_is_the_current_one(standin):  # noqa: F811
    for sizes in ([3], []):
        destination = device_copies.destination("standin", sizes)
        fill(destination, payloads_of(sizes))
        assert [*map(bytes_of, destination.storages())] == payloads_of(sizes)


# ---- clones


def test_clones_are_the_values_at_the_call(standin):  # noqa: F811
    records = Records()
    standin.reset()
    with late(standin, 2000):
        clones = device_copies.clones(records.records)
        assert not clones.done()
        for tensor in records.tensors:
            tensor.fill_(9)
        clones.wait()
        assert clones.done()
    assert standin.gathers == 2 and standin.stream_synchronizations == standin.blocking_copies == 0
    assert [r is None for r in clones.records] == [r is None or r[2] == 0 for r in records.records]
    assert {r[0]._cdata for r in clones.records if r}.isdisjoint(r[0]._cdata for r in records.records if r)
    for i, clone in enumerate(clones.records):
        if clone is not None:
            assert clone[0].device == records.records[i][0].device
            assert bytes_of(*clone) == records.expected[i]
    records.records = clones.records
    records.assert_copied(device_copies.source(clones.records))


def test_clones_without_waiting_for_events_differ(standin):  # noqa: F811
    records = Records([300 * KIB] * 4, ["standin:0"])
    standin.drain()
    standin.delay_us, standin.lose_event_synchronize = 50_000, 1
    clones = device_copies.clones(records.records)
    clones.wait()
    assert not clones.done()  # ... and whoever looks at another stream now sees what was there before
    standin.drain()


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_clones_where_a_device_has_no_room(standin, nth):  # noqa: F811
    records = Records([300 * KIB] * 2 + [1000] * 2)
    with late(standin):
        standin.fail_allocation = nth
        assert device_copies.clones(records.records) is None and standin.fail_allocation == 0


def test_clones_on_a_device_that_fails(standin):  # noqa: F811
    clones = device_copies.clones(Records([300 * KIB], ["standin:0"]).records)
    standin.fail_event_synchronize = 1
    with pytest.raises(RuntimeError, match="standin: the device was lost"):
        clones.wait()


def test_clones_of_nothing(standin):  # noqa: F811
    clones = device_copies.clones([None, None])
    assert clones.records == [None, None] and clones.done() is True
    clones.wait()
