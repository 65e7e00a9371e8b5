"""save_async: the state at the call, whatever happens next; what the call refuses, and errors."""

import errno
import gc
import os
import threading
import time

import pytest
import torch
from async_saves import SLOW, Unpicklable, failed_save, full_disk, nothing_stays_behind, pool_nbytes  # noqa: F401 - a fixture
from async_states import MIB, chance_of, disturb, random_bytes, random_state
from oracle import assert_loads_alike, assert_same_bytes, first_difference, names_in, two_directories

import statedict_io as sio
from statedict_io.writing.in_flight import register

# ---- the state at the call


@pytest.mark.timeout(900)
@pytest.mark.parametrize("rounds", [50, pytest.param(1000, marks=pytest.mark.long)])
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
        assert pending._save.nbytes <= 24 * MIB
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
    assert register.in_flight == []


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
    error = failed_save(path, backend)._save.error
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
