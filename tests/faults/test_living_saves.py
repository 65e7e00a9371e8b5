"""A temporary stays while somebody writes it, in whatever process, however long that takes."""

import contextlib
import os
import signal
import subprocess
import threading
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import statedict_io as sio
from faults.temporary_files import DAY, HOUR, MINUTE, age, temporaries
from faults.ways import OPTIONS, options_for, save
from statedict_io.dcp import SingleFileWriter
from statedict_io.system import locks
from statedict_io.writing import replacement
from statedict_io.writing.targets import resolve


class Saver:
    """A process that saves model.pt in ``directory`` and stops in the middle.

    Args:
        starts: "fork": another process, ``child``, which has all that it has; "exec": another program, which does not
            close what it has inherited.
    """

    def __init__(self, directory, *, starts="", backend="auto"):
        self.child = 0
        told, tell = os.pipe()
        waits, self.tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self.save(directory, starts, backend, tell, waits)
                status = 0
            finally:
                os._exit(status)
        os.close(tell)
        os.close(waits)
        with open(told) as lines:
            self.child = int(lines.readline())
        (self.temporary,) = temporaries(directory)

    @staticmethod
    def save(directory, starts, backend, tell, waits):
        signal.alarm(100)
        torch.set_num_threads(1)  # OpenMP's threads do not survive fork(), and torch waits for them

        def stop(*_):
            nonlocal tell
            if tell is None:
                return
            child = 0
            if starts == "fork":
                child = os.fork()
                if child == 0:
                    os.close(tell)
                    signal.alarm(100)
                    signal.pause()
            if starts == "exec":
                of_its_own = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
                child = subprocess.Popen(["sleep", "100"], close_fds=False, **of_its_own).pid
            os.write(tell, b"%d\n" % child)
            os.close(tell)
            tell = None
            os.read(waits, 1)

        save(directory / "model.pt", {"weight": torch.zeros(1 << 20)}, progress=stop, backend=backend)

    def finish(self):
        os.write(self.tell, b"!")
        pid, self.pid = self.pid, 0
        assert os.waitpid(pid, 0)[1] == 0

    def kill(self):
        pid, self.pid = self.pid, 0
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def close(self):
        self.kill()
        if self.child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, signal.SIGKILL)
        os.close(self.tell)


@pytest.fixture
def saver(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(**options):
            return stack.enter_context(contextlib.closing(Saver(tmp_path, **options)))

        yield start


def test_another_process(saver, backend, tmp_path):
    """Stays while it lives, also where it is stopped and has written nothing for days; goes when it has been killed."""
    path = tmp_path / "model.pt"
    other = saver(backend=backend)
    os.kill(other.pid, signal.SIGSTOP)
    age(other.temporary, 3 * DAY)
    save(path)
    assert other.temporary.exists()
    os.kill(other.pid, signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    age(other.temporary, 0)
    save(path)
    assert other.temporary.exists()
    age(other.temporary, 2 * MINUTE)
    save(path)
    assert not other.temporary.exists()


def test_another_process_that_goes_on(saver, backend, tmp_path):
    other = saver(backend=backend)
    age(other.temporary, 3 * DAY)
    save(tmp_path / "model.pt")
    other.finish()
    assert sio.load(tmp_path / "model.pt")["weight"].numel() == 1 << 20
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_forked_child_keeps_its_parents_temporary(saver, backend, tmp_path):
    """As long as it lives: it has the file open, as the parent had."""
    path = tmp_path / "model.pt"
    other = saver(starts="fork", backend=backend)
    other.kill()
    age(other.temporary, 3 * DAY)
    save(path)
    assert other.temporary.exists()
    os.kill(other.child, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while other.temporary.exists() and time.monotonic() < deadline:  # it ends at its own pace, and nobody waits for it
        save(path)
    assert not other.temporary.exists()


def test_another_program_keeps_nothing(saver, tmp_path):
    other = saver(starts="exec")
    other.kill()
    os.kill(other.child, 0)  # lives
    age(other.temporary, 2 * MINUTE)
    save(tmp_path / "model.pt")
    assert not other.temporary.exists()


def in_a_forked_child(action):
    """How a child that does it ends."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(100)
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def test_a_forked_child_that_saves_to_the_path(backend, tmp_path):
    path, seen = tmp_path / "model.pt", []

    def in_the_middle(*_):
        if not seen:
            (temporary,) = temporaries(tmp_path)
            age(temporary, 3 * DAY)
            seen.append(in_a_forked_child(lambda: save(path, backend=backend)))
            save(path, backend=backend)
            assert temporary.exists()

    torch.set_num_threads(1)  # OpenMP's threads do not survive fork(), and torch waits for them
    save(path, {"weight": torch.zeros(1 << 20)}, backend=backend, progress=in_the_middle)
    assert seen == [0]
    assert sio.load(path)["weight"].numel() == 3  # of the call that began last
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("for_torch", [False, True])
def test_a_forked_child_that_drops_its_parents_save(for_torch, tmp_path):
    """It neither removes the temporary nor ends the lock."""
    path = tmp_path / "model.pt"
    target = resolve(str(path))
    with replacement.Replacement(target, durable=False, for_torch=for_torch) as file:
        (temporary,) = temporaries(tmp_path)
        temporary.write_bytes(b"new")
        assert in_a_forked_child(file.abandon) == 0
        age(temporary, 3 * DAY)
        save(path)
        assert temporary.exists()
        file.commit()
    target.close()
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("way", OPTIONS)
def test_another_save_of_this_process(way, tmp_path):
    """Also where another descriptor of the temporary has been opened and closed."""
    if way == "native" and sio.backend_info().name != "native":
        pytest.skip("no native backend")
    path, seen = tmp_path / "model.pt", []

    class Saves:
        def __reduce__(self):
            for temporary in temporaries(tmp_path):
                temporary.read_bytes()
                age(temporary, 3 * DAY)
                save(path, **OPTIONS[way])
                assert temporary.exists()
                seen.append(temporary)
            return str, ("",)

    def in_the_middle(*_):
        if not seen:
            Saves().__reduce__()

    options = OPTIONS[way]
    if way in ("legacy", "stock"):  # torch pickles into the temporary
        with options_for(way):
            sio.save([torch.zeros(3), Saves()], path, **options)
    else:
        sio.save([torch.zeros(1 << 20)], path, progress=in_the_middle, **options)
    assert len(seen) == 1 and os.listdir(tmp_path) == ["model.pt"]


def test_a_save_of_many_ranks(backend, tmp_path):
    """The coordinator holds it until the end, whoever else has had it open."""
    path, seen = tmp_path / "model.pt", []

    def another_save(when):
        (temporary,) = temporaries(tmp_path)
        age(temporary, 3 * DAY)
        save(path)
        assert temporary.exists()
        seen.append(when)

    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item):
            another_save("while a rank collects")
            return super().resolve_data(write_item)

    class Writer(SingleFileWriter):
        def finish(self, metadata, results):
            another_save("when all have written")
            super().finish(metadata, results)

    state = {"weight": torch.zeros(1 << 20)}
    dcp.save(state, storage_writer=Writer(path, backend=backend), planner=Planner())
    assert seen == ["while a rank collects", "when all have written"]
    assert sio.load(path)["weight"].numel() == 1 << 20 and os.listdir(tmp_path) == ["model.pt"]


def test_just_created_and_not_locked_yet(tmp_path, monkeypatch):
    """The other thread's file is seen in the instant before its lock."""
    created, go_on, path = threading.Event(), threading.Event(), tmp_path / "model.pt"
    hold = locks.hold

    def hold_late(fd, **options):
        if threading.current_thread() is thread:
            created.set()
            assert go_on.wait(100)
        return hold(fd, **options)

    monkeypatch.setattr(locks, "hold", hold_late)
    thread = threading.Thread(target=save, args=(path, {"weight": torch.zeros(5)}))
    thread.start()
    assert created.wait(100)
    (temporary,) = temporaries(tmp_path)
    save(path)
    assert temporary.exists()
    go_on.set()
    thread.join()
    assert sio.load(path)["weight"].numel() == 5


@pytest.mark.parametrize("durable", [True, False])
def test_written_and_not_renamed_yet(durable, tmp_path, monkeypatch):
    """It is closed then, and so not locked; after a long flush, or a long wait for other saves, it would look old."""
    path, now = tmp_path / "model.pt", time.monotonic()
    target, asked = resolve(str(path)), []

    def wait():
        asked.append(1)
        (temporary,) = temporaries(tmp_path)
        if len(asked) == 1:  # still locked
            age(temporary, HOUR)
        save(path)
        if len(asked) == 1:
            monkeypatch.setattr(time, "monotonic", lambda: now + HOUR)
        assert temporary.exists()
        return False

    with replacement.Replacement(target, durable=durable) as file:
        os.write(file.fd, b"new")
        file.commit(wait)
    target.close()
    assert len(asked) == 2 and path.read_bytes() == b"new"
