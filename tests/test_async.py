"""save_async: the state at the call, whatever happens next; limits, order and errors."""

import contextlib
import errno
import gc
import os
import resource
import signal
import threading
import time

import pytest
import torch
from async_states import MIB, chance_of, disturb, random_bytes, random_state
from oracle import assert_loads_alike, assert_same_bytes, first_difference, names_in, two_directories

import statedict_io as sio
from statedict_io.writing import pending as pending_module

SLOW = 10 * MIB  # bytes per second


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    """No save in flight and no error uncollected, before and after."""
    yield
    with contextlib.suppress(Exception):
        sio.wait_all(60)
    left = []
    while (save := pending_module._register.take_uncollected()) is not None:
        left.append(save)
    assert left == [], "a test left errors that nobody collected"


@contextlib.contextmanager
def full_disk(nbytes=MIB):
    """No file of this process can be longer."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def failed_save(path, backend):
    """A PendingSave that has ended in an error which nobody has asked for."""
    with full_disk():
        pending = sio.save_async({"w": random_bytes(3 * MIB, 0)}, path, backend=backend)
        while not pending.done():
            time.sleep(0.001)
    return pending


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("cannot be pickled")


# ---- the state at the call


@pytest.mark.timeout(900)
@pytest.mark.parametrize("rounds", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_the_file_is_the_state_at_the_call(tmp_path, backend, rounds):
    ref, ours = two_directories(tmp_path)
    for number in range(rounds):
        chance = chance_of(number)
        state = random_state(chance)
        torch.save(state, ref / "model.pt")
        # In half of the rounds the writing only begins when the tensors are long different.
        limit = {"max_bytes_per_second": 200 * MIB} if chance.random() < 0.5 else {}
        pending = sio.save_async(state, ours / "model.pt", backend=backend, durable=number % 10 == 0, **limit)
        disturb(chance, state)
        pending.result(60)
        try:
            assert_same_bytes(ref / "model.pt", ours / "model.pt")
        except AssertionError as e:
            raise AssertionError(f"round {number}: {e}") from None
    assert names_in(ours) == ["model.pt"]


def test_without_a_copy_the_bytes_would_differ(tmp_path, monkeypatch):
    """That the disturbance reaches what is written where no snapshot is taken."""
    from statedict_io.backends import arenas

    monkeypatch.setattr(arenas, "copy", lambda pieces: None)
    ref, ours = two_directories(tmp_path)
    state = {"w": random_bytes(MIB, 1)}
    torch.save(state, ref / "model.pt")
    sio.save_async(state, ours / "model.pt", backend="torch").result()
    assert first_difference(ref / "model.pt", ours / "model.pt") is not None


@pytest.mark.parametrize("durable", [True, False])
def test_loads_as_a_synchronous_save_does(tmp_path, backend, durable):
    ref, ours = two_directories(tmp_path)
    state = random_state(chance_of(3)) | {"large": random_bytes(20 * MIB + 3, 5)}
    torch.save(state, ref / "model.pt")
    sio.save_async(state, ours / "model.pt", backend=backend, durable=durable).result()
    assert_same_bytes(ref / "model.pt", ours / "model.pt")
    assert_loads_alike(ref / "model.pt", ours / "model.pt")


@pytest.mark.parametrize("options", [{"pickle_protocol": 4}, {"_disable_byteorder_record": True}])
def test_options_of_torch_save(tmp_path, backend, options):
    ref, ours = two_directories(tmp_path)
    state = random_state(chance_of(4))
    torch.save(state, ref / "model.pt", **options)
    sio.save_async(state, ours / "model.pt", backend=backend, **options).result()
    assert_same_bytes(ref / "model.pt", ours / "model.pt")


def test_the_legacy_format_is_written_in_the_call(tmp_path, backend):
    ref, ours = two_directories(tmp_path)
    state = {"w": torch.arange(1000.0)}
    torch.save(state, ref / "model.pt", _use_new_zipfile_serialization=False)
    pending = sio.save_async(state, ours / "model.pt", backend=backend, _use_new_zipfile_serialization=False)
    assert pending.done() and pending.snapshot_done()
    assert torch.equal(torch.load(ours / "model.pt")["w"], state["w"])
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        sio.save_async([Unpicklable()], ours / "x.pt", backend=backend, _use_new_zipfile_serialization=False)
    assert names_in(ours) == ["model.pt"]


def test_skip_data_takes_no_memory_for_holes(tmp_path, backend):
    ref, ours = two_directories(tmp_path)
    state = {"w": torch.empty(64 * MIB, dtype=torch.uint8), "v": torch.empty(5)}
    with torch.serialization.skip_data():
        torch.save(state, ref / "model.pt")
        pending = sio.save_async(state, ours / "model.pt", backend=backend, max_snapshot_nbytes=24 * MIB)
        assert pending._nbytes <= 24 * MIB
    pending.result()
    assert_same_bytes(ref / "model.pt", ours / "model.pt")


def test_a_relative_path_is_that_of_the_call(tmp_path, backend, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    pending = sio.save_async({"w": torch.ones(1000)}, "model.pt", backend=backend)
    monkeypatch.chdir(tmp_path / "elsewhere")
    pending.result()
    assert names_in(tmp_path) == ["elsewhere", "model.pt"] and names_in(tmp_path / "elsewhere") == []


def test_a_fifo(tmp_path, backend):
    fifo = tmp_path / "model.pt"
    os.mkfifo(fifo)
    ref, _ = two_directories(tmp_path)
    state = {"w": random_bytes(9 * MIB, 1)}
    torch.save(state, ref / "model.pt")
    pending = sio.save_async(state, fifo, backend=backend)
    state["w"].zero_()
    assert fifo.read_bytes() == (ref / "model.pt").read_bytes()
    pending.result()


@pytest.mark.parametrize("nbytes", [100, 30 * MIB])
def test_progress_comes_from_the_thread_that_writes(tmp_path, backend, nbytes):
    seen = []
    sio.save_async(
        {"w": random_bytes(nbytes, 1)},
        tmp_path / "m.pt",
        backend=backend,
        progress=lambda *done_and_total: seen.append((threading.get_ident(), *done_and_total)),
    ).result()
    total = (tmp_path / "m.pt").stat().st_size
    assert {thread for thread, _, _ in seen}.isdisjoint({threading.get_ident()})
    assert seen[-1][1:] == (total, total)


# ---- what the call itself refuses


def test_refused_in_the_call(tmp_path, backend):
    old = tmp_path / "model.pt"
    old.write_bytes(b"old")
    same_bytes = torch.zeros(8, dtype=torch.uint8)
    for error, obj, path, options in [
        (RuntimeError, [Unpicklable()], old, {}),
        (RuntimeError, [same_bytes, same_bytes.view(torch.int64)], old, {}),
        (RuntimeError, {}, tmp_path / "no" / "model.pt", {}),
        (OSError, {}, tmp_path, {}),
        (TypeError, {}, open(os.devnull, "wb"), {}),  # noqa: SIM115
        (TypeError, {}, old, {"progress": 3}),
        (ValueError, {}, old, {"max_in_flight": 0}),
        (ValueError, {}, old, {"max_snapshot_nbytes": -1}),
        (ValueError, {}, old, {"max_device_snapshot_nbytes": -1}),
        (ValueError, {}, old, {"device_margin_nbytes": -1}),
        (ValueError, {}, old, {"max_bytes_per_second": 0}),
        (ValueError, {}, old, {"when_full": "drop"}),
        (ValueError, {}, old, {"backend": "none"}),
    ]:
        with pytest.raises(error):
            sio.save_async(obj, path, **{"backend": backend, **options})
    assert old.read_bytes() == b"old"
    assert names_in(tmp_path) == ["model.pt"]
    assert pending_module._register.in_flight == []


# ---- what PendingSave says


def test_pending_save(tmp_path, backend):
    path = tmp_path / "model.pt"
    pending = sio.save_async({"w": random_bytes(4 * MIB, 0)}, path, backend=backend, max_bytes_per_second=SLOW)
    assert pending.snapshot_done()
    pending.wait_snapshot()
    assert not pending.done() and "in flight" in repr(pending)
    for ask in (pending.result, pending.exception):
        with pytest.raises(TimeoutError, match=r"model\.pt"):
            ask(timeout=0.001)
    assert pending.result() is None
    assert pending.done() and pending.snapshot_done() and pending.exception() is None and "done" in repr(pending)
    pending.wait_snapshot()


def test_with_waits(tmp_path, backend):
    path = tmp_path / "model.pt"
    with sio.save_async({"w": random_bytes(2 * MIB, 0)}, path, backend=backend, max_bytes_per_second=SLOW) as pending:
        assert isinstance(pending, sio.PendingSave)
    assert pending.done() and path.exists()


def test_with_raises_the_error_of_the_save_but_not_over_that_of_the_body(tmp_path, backend):
    with full_disk():
        with pytest.raises(OSError, match=r"model\.pt"):  # noqa: SIM117
            with sio.save_async({"w": random_bytes(3 * MIB, 0)}, tmp_path / "model.pt", backend=backend):
                pass
        with pytest.raises(KeyError):  # noqa: SIM117
            with sio.save_async({"w": random_bytes(3 * MIB, 0)}, tmp_path / "model.pt", backend=backend):
                raise KeyError
    with pytest.raises(OSError, match=r"model\.pt"):
        sio.wait_all()


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
    assert pending_module._register.in_flight == []
    assert path.read_bytes() == expected and names_in(tmp_path) == ["model.pt"]


def pool_nbytes(backend):
    if backend == "native":
        from statedict_io import _core

        return _core.snapshot_pool_nbytes()
    from statedict_io.backends import arenas

    return arenas._nbytes


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


# ---- errors


def test_disk_full(tmp_path, backend):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    pending = failed_save(path, backend)
    error = pending.exception()
    assert isinstance(error, OSError) and error.errno == errno.EFBIG and error.filename == str(path)
    with pytest.raises(OSError, match=r"model\.pt") as raised:
        pending.result()
    assert raised.value is error and "failed" in repr(pending)
    assert path.read_bytes() == b"old" and names_in(tmp_path) == ["model.pt"]


def test_an_error_that_nobody_asked_for_is_raised_by_the_next_save_to_the_path(tmp_path, backend):
    path = tmp_path / "model.pt"
    error = failed_save(path, backend)._error
    gc.collect()
    sio.save_async({"w": 1}, tmp_path / "other.pt", backend=backend).result()
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    with pytest.raises(OSError, match=r"model\.pt") as raised:
        sio.save_async({"w": 1}, link, backend=backend)
    assert raised.value is error
    assert "earlier save_async" in "".join(getattr(error, "__notes__", ["earlier save_async"]))
    assert not path.exists()
    sio.save_async({"w": 2}, link, backend=backend).result()
    assert torch.load(path) == {"w": 2}


def test_a_collected_error_is_not_raised_again(tmp_path, backend):
    path = tmp_path / "model.pt"
    assert failed_save(path, backend).exception() is not None
    sio.save_async({"w": 2}, path, backend=backend).result()


def test_wait_all_raises_every_error_once(tmp_path, backend):
    for name in ("a.pt", "b.pt"):
        failed_save(tmp_path / name, backend)
    for name in ("a.pt", "b.pt"):
        with pytest.raises(OSError, match=name.replace(".", r"\.")):
            sio.wait_all()
    sio.wait_all()


def test_wait_all_times_out(tmp_path, backend):
    pending = sio.save_async({"w": random_bytes(4 * MIB, 0)}, tmp_path / "a.pt", backend=backend,
                             max_bytes_per_second=SLOW)  # fmt: skip
    with pytest.raises(TimeoutError, match="1 saves"):
        sio.wait_all(0.001)
    sio.wait_all()
    assert pending.done()


def test_a_kept_error_keeps_no_tensors(tmp_path, backend):
    sio.release_buffers()
    pending = failed_save(tmp_path / "model.pt", backend)
    sio.release_buffers()
    assert pool_nbytes(backend) == 0
    assert isinstance(pending.exception(), OSError)


# ---- beside the caller's threads


@pytest.mark.alone
def test_the_gil_is_free_while_the_file_is_written(tmp_path, backend):
    pending = sio.save_async({"w": random_bytes(16 * MIB, 0)}, tmp_path / "a.pt", backend=backend, durable=False,
                             max_bytes_per_second=40 * MIB)  # fmt: skip
    ticks = 0
    while not pending.done():
        time.sleep(0.001)
        ticks += 1
    pending.result()
    assert ticks > 40  # 0.4 s, of which a thread that held the GIL would leave nothing


def test_the_rate_is_kept(tmp_path, backend):
    start = time.monotonic()
    sio.save_async({"w": random_bytes(10 * MIB, 0)}, tmp_path / "a.pt", backend=backend, durable=False,
                   max_bytes_per_second=20 * MIB).result()  # fmt: skip
    assert time.monotonic() - start >= 0.5


@pytest.mark.alone
def test_a_slow_write_that_fails_stops_at_once(tmp_path, backend):
    start = time.monotonic()
    with full_disk():
        pending = sio.save_async({"w": random_bytes(60 * MIB, 0)}, tmp_path / "a.pt", backend=backend, durable=False,
                                 max_bytes_per_second=12 * MIB)  # fmt: skip
        assert isinstance(pending.exception(), OSError)
    assert time.monotonic() - start < 4  # of 5


def test_where_no_thread_can_be_started_the_call_writes(tmp_path, backend, monkeypatch):
    def refused(self):
        raise RuntimeError("can't start new thread")

    state = {"w": random_bytes(3 * MIB, 0)}
    ref, ours = two_directories(tmp_path)
    torch.save(state, ref / "a.pt")
    sio.save({}, tmp_path / "first.pt", backend=backend)  # the backend's proof runs in a thread
    monkeypatch.setattr(threading.Thread, "start", refused)
    assert sio.save_async(state, ours / "a.pt", backend=backend).done()
    assert_same_bytes(ref / "a.pt", ours / "a.pt")


def test_many_threads_save_at_once(tmp_path, backend):
    ref, ours = two_directories(tmp_path)
    states = [random_state(chance_of(i)) for i in range(8)]
    for i, state in enumerate(states):
        torch.save(state, ref / f"{i}.pt")

    def saves(i):
        for _ in range(5):
            sio.save_async(states[i], ours / f"{i}.pt", backend=backend, durable=False, max_in_flight=3)

    threads = [threading.Thread(target=saves, args=(i,)) for i in range(len(states))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sio.wait_all()
    for i in range(len(states)):
        assert_same_bytes(ref / f"{i}.pt", ours / f"{i}.pt")
