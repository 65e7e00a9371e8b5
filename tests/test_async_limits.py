"""save_async: the order of saves, their limits, and what many of them leave behind."""

import gc
import os
import signal

import pytest
import torch
from async_saves import SLOW, Unpicklable, full_disk, nothing_stays_behind, pool_nbytes  # noqa: F401 - a fixture
from async_states import MIB, chance_of, random_bytes
from oracle import assert_same_bytes, names_in, two_directories

import statedict_io as sio
from statedict_io.writing.in_flight import register

# ---- order


def test_the_last_call_wins(tmp_path, backend):
    path = tmp_path / "model.pt"
    for number in range(6):  # the earlier, the slower
        sio.save_async(
            {"number": number, "w": random_bytes(MIB, number)},
            path,
            backend=backend,
            durable=False,
            max_in_flight=10,
            max_bytes_per_second=(number + 1) * 3 * SLOW,
        )
    sio.wait_all()
    assert torch.load(path)["number"] == 5


def test_a_synchronous_save_comes_after_earlier_asynchronous_ones(tmp_path, backend):
    path = tmp_path / "model.pt"
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    pending = sio.save_async({"w": random_bytes(4 * MIB, 0)}, path, backend=backend, max_bytes_per_second=SLOW)
    sio.save({"w": "last"}, link, backend=backend)
    assert pending.done()
    assert torch.load(path) == {"w": "last"}


def test_directories_are_those_of_the_call(tmp_path, backend):
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    old.mkdir()
    new.mkdir()
    link.symlink_to(old)
    first = sio.save_async({"w": random_bytes(4 * MIB, 0)}, link / "a.pt", backend=backend, max_bytes_per_second=SLOW)
    sio.save({"w": 2}, old / "a.pt", backend=backend)  # the same file, spelled otherwise
    assert first.done() and torch.load(old / "a.pt") == {"w": 2}
    second = sio.save_async({"w": random_bytes(4 * MIB, 0)}, link / "b.pt", backend=backend, max_bytes_per_second=SLOW)
    link.unlink()
    link.symlink_to(new)
    second.result()
    assert names_in(old) == ["a.pt", "b.pt"] and names_in(new) == []


def test_saves_to_other_paths_do_not_wait_for_each_other(tmp_path, backend):
    slow = sio.save_async(
        {"w": random_bytes(8 * MIB, 0)}, tmp_path / "a.pt", backend=backend, max_bytes_per_second=SLOW
    )
    sio.save_async({"w": torch.ones(3)}, tmp_path / "b.pt", backend=backend).result()
    assert not slow.done()


# ---- limits


def test_past_the_limits_the_call_waits(tmp_path, backend):
    state = {"w": random_bytes(7 * MIB, 0)}
    first = sio.save_async(state, tmp_path / "a.pt", backend=backend, max_bytes_per_second=SLOW)
    second = sio.save_async(state, tmp_path / "b.pt", backend=backend, max_in_flight=1, max_bytes_per_second=SLOW)
    assert first.done() and not second.done()
    third = sio.save_async(state, tmp_path / "c.pt", backend=backend, max_snapshot_nbytes=10 * MIB)
    assert second.done()
    third.result()


def test_past_the_limits_the_call_raises_where_that_is_asked_for(tmp_path, backend):
    state = {"w": random_bytes(7 * MIB, 0)}
    first = sio.save_async(state, tmp_path / "a.pt", backend=backend, max_bytes_per_second=SLOW)
    for limit in ({"max_in_flight": 1}, {"max_snapshot_nbytes": 10 * MIB}, {"max_snapshot_nbytes": 0}):
        with pytest.raises(sio.SnapshotLimitError, match=r"b\.pt.*1 saves in flight.*" + next(iter(limit))):
            sio.save_async(state, tmp_path / "b.pt", backend=backend, when_full="raise", **limit)
    assert not first.done() and not (tmp_path / "b.pt").exists()
    first.result()


def test_what_is_larger_than_the_limit_is_written_in_the_call(tmp_path, backend):
    ref, ours = two_directories(tmp_path)
    state = {"w": random_bytes(20 * MIB, 0)}
    torch.save(state, ref / "model.pt")
    pending = sio.save_async(state, ours / "model.pt", backend=backend, max_snapshot_nbytes=MIB)
    assert pending.done() and pending.snapshot_done()
    assert_same_bytes(ref / "model.pt", ours / "model.pt")
    with full_disk():
        failed = sio.save_async(state, ours / "other.pt", backend=backend, max_snapshot_nbytes=MIB)
    assert isinstance(failed.exception(), OSError)


def test_a_signal_while_the_call_waits(tmp_path, backend):
    class Alarm(Exception):
        pass

    def ring(*_):
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    try:
        first = sio.save_async({"w": random_bytes(8 * MIB, 0)}, tmp_path / "a.pt", backend=backend,
                               max_bytes_per_second=SLOW)  # fmt: skip
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Alarm):
            sio.save_async({"w": torch.ones(3)}, tmp_path / "b.pt", backend=backend, max_in_flight=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    first.result()
    sio.save_async({"w": torch.ones(3)}, tmp_path / "b.pt", backend=backend, max_in_flight=1).result()


@pytest.mark.parametrize("rounds", [150, pytest.param(2000, marks=pytest.mark.long)])
def test_signals_at_any_moment_of_the_call_leave_nothing_in_flight(tmp_path, backend, rounds):
    class Alarm(BaseException):  # as KeyboardInterrupt: of others Thread.start makes a KeyError at times
        pass

    def ring(*_):
        raise Alarm

    path, chance, rung = tmp_path / "model.pt", chance_of(0), 0
    state = {"w": random_bytes(5 * MIB, 0)}
    sio.save(state, path, backend=backend)
    expected = path.read_bytes()
    before = signal.signal(signal.SIGALRM, ring)
    try:
        for _ in range(rounds):
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.008))
                try:
                    sio.save_async(state, path, backend=backend, durable=False, max_in_flight=2)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except BaseException as e:
                # In the middle of Condition.wait or Thread.start it comes up as an error of Python's own locks.
                if not isinstance(e, Alarm) and not isinstance(e.__context__, Alarm):
                    raise
                rung += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert 0 < rung < rounds
    sio.wait_all(60)
    assert register.in_flight == []
    assert path.read_bytes() == expected and names_in(tmp_path) == ["model.pt"]


def resident_nbytes():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_memory_descriptors_and_threads_after_many_saves(tmp_path, backend, number):
    sio.release_buffers()
    cap = 48 * MIB
    state = {"w": random_bytes(14 * MIB, 0), "v": random_bytes(300_000, 1)}
    failing = state | {"x": Unpicklable()}

    def save(i):
        path = tmp_path / f"{i % 3}.pt"
        options = {"backend": backend, "durable": False, "max_in_flight": 3, "max_snapshot_nbytes": cap}
        if i % 10 == 7:
            with pytest.raises(RuntimeError):
                sio.save_async(failing, path, **options)
        elif i % 10 == 8:
            sio.wait_all()
            with full_disk():
                assert isinstance(sio.save_async(state, path, **options).exception(), OSError)
        else:
            # At times less than a snapshot fewer, at times more than all.
            small = {"w": state["w"][: 1000 * (i % 7)].clone()} if i % 4 == 0 else state
            sio.save_async(small, path, **options)
        assert pool_nbytes(backend) <= cap

    def level():
        sio.wait_all()
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    for i in range(20):
        save(i)
    before, memory, pool = level(), resident_nbytes(), pool_nbytes(backend)
    for i in range(number):
        save(i)
    assert level() == before
    assert pool_nbytes(backend) <= max(pool, cap)
    assert resident_nbytes() - memory <= cap - pool + 8 * MIB
    sio.release_buffers()
    assert pool_nbytes(backend) == 0
    assert resident_nbytes() - memory < 8 * MIB
