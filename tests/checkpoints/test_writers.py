"""Two writers, readers beside a writer, forked children, signals."""

import contextlib
import errno
import os
import signal
import threading
import time

import pytest
import torch
from faults.killed_children import forked

import statedict_io as sio
from statedict_io.checkpoints import leases, writer_lock


def in_child(action):
    """Whether ``action`` ran without an exception in a forked child."""
    _, status = os.waitpid(forked(action), 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


@contextlib.contextmanager
def beside(action):
    """``action(ready)`` in a forked child, from when it has called ``ready()`` until the block ends."""
    (told, tell), (wait, go_on) = os.pipe(), os.pipe()

    def run():
        os.close(go_on)

        def ready():
            os.write(tell, b"1")
            os.read(wait, 1)

        action(ready)

    child = forked(run)
    os.close(tell)
    assert os.read(told, 1) == b"1"
    try:
        yield child
    finally:
        os.close(go_on)
        _, status = os.waitpid(child, 0)
        for fd in (told, wait):
            os.close(fd)
        assert status in (0, signal.SIGKILL)


def save_and_wait(path, state):
    def run(ready):
        ckpts = sio.CheckpointDirectory(path)
        ckpts.save(state(1), 1)
        ready()

    return run


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's threads do not survive fork()
    yield
    torch.set_num_threads(before)


def test_the_second_writer_is_told_who_is_the_first(tmp_path, state):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    with beside(save_and_wait(tmp_path, state)) as child:
        for save in (ckpts.save, ckpts.save_async, lambda state, step: ckpts.discard_after(step)):
            with pytest.raises(sio.CheckpointDirectoryInUseError, match=f"process {child} on "):
                save(state(2), 2)
        assert [found.step for found in ckpts] == [1] and ckpts.restore() == 1
        ckpts.protect(1)
        allowed = sio.CheckpointDirectory(tmp_path, allow_other_writers=True)
        allowed.save(state(3), 3)
    ckpts.save(state(4), 4)
    assert [found.step for found in ckpts] == [1, 4]


@pytest.mark.parametrize("held", [False, True])
def test_a_lock_that_another_user_has_left_can_only_be_read(tmp_path, state, held, monkeypatch):
    (tmp_path / writer_lock.NAME).touch()
    real = writer_lock.open_file

    def open_file(path, flags, *mode):
        if flags & os.O_RDWR and os.path.exists(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags, *mode)

    first = sio.CheckpointDirectory(tmp_path) if held else None
    if first is not None:
        first.save(state(1), 1)
    monkeypatch.setattr(writer_lock, "open_file", open_file)
    second = sio.CheckpointDirectory(tmp_path)
    if first is not None:
        with pytest.raises(sio.CheckpointDirectoryInUseError):
            second.save(state(2), 2)
        first.close()
    second.save(state(2), 2)
    third = sio.CheckpointDirectory(tmp_path)
    with pytest.raises(sio.CheckpointDirectoryInUseError):
        third.save(state(3), 3)
    second.close()
    assert not (tmp_path / writer_lock.NAME).exists()


def test_a_directory_that_may_not_be_written_is_named(tmp_path, state):
    run = tmp_path / "run"
    run.mkdir()

    def save():
        if os.geteuid() == 0:
            os.chdir(run)
            os.seteuid(65534)
        else:
            run.chmod(0o555)
        try:
            sio.CheckpointDirectory(".").save(state(1), 1)
        except PermissionError as e:
            assert os.path.dirname(e.filename) == str(tmp_path) or e.filename in (".", f"{run}/."), e
            return
        raise AssertionError("it was saved")

    assert in_child(save)
    run.chmod(0o755)


def test_what_a_killed_writer_leaves_stops_nobody(tmp_path, state):
    with beside(save_and_wait(tmp_path, state)) as child:
        os.kill(child, signal.SIGKILL)
    assert (tmp_path / writer_lock.NAME).exists()
    with sio.CheckpointDirectory(tmp_path, keep_last=1) as ckpts:
        ckpts.save(state(2), 2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002.pt", "step-00000002.pt.json"]


def test_two_objects_of_one_process(tmp_path, state):
    first, second = sio.CheckpointDirectory(tmp_path), sio.CheckpointDirectory(tmp_path)
    first.save(state(1), 1)
    with pytest.raises(sio.CheckpointDirectoryInUseError, match="another CheckpointDirectory of this process"):
        second.save(state(2), 2)
    first.close()
    second.save(state(2), 2)
    del second  # as where a notebook's cell is run again
    first.save(state(3), 3)
    assert [found.step for found in first] == [1, 2, 3]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF])
def test_where_there_are_no_locks_nobody_is_told_and_everything_else_works(tmp_path, state, number, monkeypatch):
    from statedict_io.system import locks

    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refused)
    first = sio.CheckpointDirectory(tmp_path, keep_last=1)
    second = sio.CheckpointDirectory(tmp_path, keep_last=2)
    first.save(state(1), 1)
    (tmp_path / "step-00000009.pt.json").write_text("{}")  # may be of a save in flight
    with first.latest().lease():
        second.save(state(2), 2)
        first.save(state(3), 3)
        assert [found.step for found in first] == [1, 3]
    first.save(state(4), 4)
    assert sorted(os.listdir(tmp_path)) == ["step-00000004.pt", "step-00000004.pt.json", "step-00000009.pt.json"]


def test_what_is_read_is_not_deleted(tmp_path, state):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    ckpts.save(state(1), 1)
    with ckpts.latest().lease():
        ckpts.save(state(2), 2)
        assert [found.step for found in ckpts] == [1, 2]
    ckpts.save(state(3), 3)
    assert [found.step for found in ckpts] == [3]


def test_nor_is_what_another_process_reads(tmp_path, state):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    ckpts.save(state(1), 1)

    def read(ready):
        with sio.CheckpointDirectory(tmp_path).latest().lease():
            ready()

    with beside(read):
        ckpts.save(state(2), 2)
        assert [found.step for found in ckpts] == [1, 2]
    ckpts.save(state(3), 3)
    assert [found.step for found in ckpts] == [3]


def test_a_lease_of_what_is_gone(tmp_path, state):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    ckpts.save(state(1), 1)
    found = ckpts.latest()
    ckpts.save(state(2), 2)
    with pytest.raises(FileNotFoundError, match="step-00000001"):
        found.load()
    assert not leases._held and not leases._descriptors


# --- forked children


def test_a_forked_child_neither_holds_nor_lets_go_what_its_parent_holds(tmp_path, state):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    ckpts.save(state(1), 1)

    def child(ready):
        ready()
        ckpts.close()  # not its own

    found = ckpts.latest()
    with found.lease(), beside(child):
        assert in_child(ckpts.close)
        assert not in_child(lambda: ckpts.save(state(5), 5))  # its parent writes
        ckpts.save(state(2), 2)
        assert [each.step for each in ckpts] == [1, 2]
    with beside(child):  # an orphaned worker does not keep the lock
        ckpts.close()
        other = sio.CheckpointDirectory(tmp_path, keep_last=1)
        other.save(state(3), 3)
    assert [each.step for each in ckpts] == [3]


def test_an_orphaned_worker_does_not_keep_its_parents_lock(tmp_path, state):
    stop = tmp_path / "stop"

    def parent(ready):
        ckpts = sio.CheckpointDirectory(tmp_path / "run")
        ckpts.save(state(1), 1)
        found = ckpts.latest()
        with found.lease():
            if os.fork() == 0:
                while tmp_path.exists() and not stop.exists():
                    time.sleep(0.01)
                os._exit(0)
            ready()

    try:
        with beside(parent) as child:
            os.kill(child, signal.SIGKILL)
        with sio.CheckpointDirectory(tmp_path / "run", keep_last=1) as ckpts:
            ckpts.save(state(2), 2)
            assert [found.step for found in ckpts] == [2]
    finally:
        stop.touch()


def test_a_child_forked_amid_saves_and_deletions_does_not_hang(tmp_path, state, monkeypatch):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    saved = ckpts.save_async(state(1), 1)
    with ckpts._writer._lock, ckpts._writer.background._lock:
        other = threading.Thread(target=lambda: child.append(in_child(lambda: (ckpts.wait(10), ckpts.close()))))
        child = []
        other.start()
        other.join(60)
    assert child == [True]
    saved.result()
    ckpts.wait()
    assert ckpts.latest().step == 1


# --- signals


def test_a_signal_sets_a_flag_and_calls_who_was_there(tmp_path):
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    # Who starts the tests in the background may have it ignored.
    at_interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with sio.CheckpointDirectory(tmp_path / "runs") as ckpts:
            ckpts.save_on_signal(signal.SIGUSR1, signal.SIGINT)
            assert not ckpts.should_stop
            signal.raise_signal(signal.SIGUSR1)
            assert ckpts.should_stop and seen == [signal.SIGUSR1]
            signal.raise_signal(signal.SIGINT)  # no KeyboardInterrupt
        signal.raise_signal(signal.SIGUSR1)
        assert len(seen) == 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, at_interrupt)
        signal.signal(signal.SIGUSR1, before)
    assert not (tmp_path / "runs").exists()


def test_a_child_that_is_told_to_end_ends(tmp_path):
    """A worker must not take the signal for a wish of the run's."""
    with sio.CheckpointDirectory(tmp_path) as ckpts:
        ckpts.save_on_signal(signal.SIGTERM)
        child = forked(lambda: signal.raise_signal(signal.SIGTERM))
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


@pytest.mark.parametrize("step", [1, 2], ids=["the same step", "another step"])
@pytest.mark.parametrize("way", ["save", "save_async"])
def test_a_handler_saves_in_the_middle_of_a_save(tmp_path, backend, way, step, state):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1, best="min")
    ckpts.save_on_signal(signal.SIGUSR1, state=lambda: (step, {"by": "handler"}))

    class Interrupts:
        def __reduce__(self):
            if not ckpts.should_stop:
                signal.raise_signal(signal.SIGUSR1)
            return (int, (7,))

    try:
        saved = getattr(ckpts, way)({"by": "loop", "seven": Interrupts()}, 1, 0.5, backend=backend)
        if saved is not None:
            saved.result()
        ckpts.wait(60)
    finally:
        ckpts.close()
    assert ckpts.should_stop
    found = ckpts.latest()
    assert (found.step, found.load()["by"]) == (step, "handler")


def test_a_handler_saves_where_an_earlier_save_has_failed(tmp_path, state, monkeypatch):
    """The error stays to be asked for: the last state of a run is worth more."""
    from statedict_io.writing import replacement

    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with sio.CheckpointDirectory(tmp_path) as ckpts:
        with monkeypatch.context() as m:
            m.setattr(replacement, "sync", full_disk)
            failed = ckpts.save_async(state(1), 1)
            ckpts.wait()
        ckpts.save_on_signal(signal.SIGUSR1, state=lambda: (2, state(2)))
        signal.raise_signal(signal.SIGUSR1)
        assert ckpts.latest().step == 2
        assert isinstance(failed.exception(), OSError)


def test_a_handler_may_wait_while_its_thread_puts_the_directory_in_order(tmp_path, state):
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    with ckpts._writer._lock:  # as below a handler
        saved = ckpts.save_async(state(1), 1)
        saved.result(60)
        ckpts.wait(60)
        ckpts.save(state(2), 2)
    ckpts.wait(60)
    assert saved.done() and [found.step for found in ckpts] == [2]


def test_save_on_signal_needs_a_signal(tmp_path):
    with pytest.raises(ValueError, match=r"signal\.SIGTERM"):
        sio.CheckpointDirectory(tmp_path).save_on_signal()


def test_an_object_that_is_gone_is_not_kept_by_its_handlers(tmp_path):
    import gc
    import weakref

    ckpts = sio.CheckpointDirectory(tmp_path)
    before = signal.getsignal(signal.SIGUSR2)
    ckpts.save_on_signal(signal.SIGUSR2)
    gone = weakref.ref(ckpts)
    try:
        del ckpts
        gc.collect()
        assert gone() is None
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.raise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
