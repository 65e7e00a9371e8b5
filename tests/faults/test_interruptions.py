"""Ctrl-C, SIGTERM and timers in the middle of a save: a Python exception or nothing, no temporary, no hang."""

import gc
import os
import shutil
import signal
import sys
import threading
import time

import pytest
import torch
from conftest import require_native

import statedict_io as sio
from faults.ways import OPTIONS, options_for
from statedict_io.writing import in_place, replacement

OLD = b"the old checkpoint"


def num_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(params=list(OPTIONS))
def options(request):
    if request.param == "native":
        require_native()
    with options_for(request.param) as options:
        yield options


class Interruption(BaseException):
    """As KeyboardInterrupt, which pytest takes for its own."""


class RaisesAtLine:
    """Raises at the n-th line that is run in `module`, as a signal's handler might."""

    def __init__(self, module, n):
        self.module, self.n, self.seen, self.where = module, n, 0, None

    def __call__(self, frame, event, _):
        names = frame.f_code.co_name, frame.f_back.f_code.co_name
        if frame.f_code.co_filename != self.module.__file__ or "__del__" in names:  # what that raises is not heard of
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.n:
                self.where = frame.f_lineno
                raise Interruption
        return self

    def run(self, action):
        previous = sys.gettrace()
        sys.settrace(self)
        try:
            action()
        except Interruption:
            return True
        finally:
            sys.settrace(previous)
        return False


def is_inseparable(module, line):
    """Between taking a descriptor out of the object and closing it the interpreter looks for no signals."""
    with open(module.__file__) as source:
        return source.read().splitlines()[line - 1].strip().startswith(("os.close(", "try:  # noqa"))


@pytest.mark.parametrize("durable", [True, False])
def test_an_exception_at_every_line_of_the_replacement(durable, options, tmp_path):
    path = tmp_path / "in" / "model.pt"
    path.parent.mkdir()
    obj = {"weight": torch.ones(100)}
    save = lambda: sio.save(obj, path, durable=durable, **options)  # noqa: E731
    save()
    new = path.read_bytes()
    counted = RaisesAtLine(replacement, -1)
    counted.run(save)
    assert counted.seen > 40
    outcomes = {OLD: 0, new: 0}
    for n in range(1, counted.seen + 1):
        path.write_bytes(OLD)
        before = num_descriptors()
        raises = RaisesAtLine(replacement, n)
        assert raises.run(save), n
        where = f"line {raises.where}"
        outcomes[path.read_bytes()] += 1
        assert os.listdir(path.parent) == ["model.pt"], where
        assert num_descriptors() == before or is_inseparable(replacement, raises.where), where
    assert min(outcomes.values()) > 3


@pytest.mark.parametrize("exists", [True, False])
def test_an_exception_at_every_line_of_writing_in_place(exists, options, tmp_path):
    """Nothing is kept but a part of a file that was there; the next save into it works."""
    path = tmp_path / "in" / "model.pt"
    path.parent.mkdir()
    obj = {"weight": torch.ones(100)}
    save = lambda: sio.save(obj, path, atomic=False, **options)  # noqa: E731
    save()
    new = path.read_bytes()
    if not exists:
        path.unlink()
    counted = RaisesAtLine(in_place, -1)
    counted.run(save)
    assert counted.seen > 20
    for n in range(1, counted.seen + 1):
        path.unlink(missing_ok=True)
        if exists:
            path.write_bytes(OLD)
        before = num_descriptors()
        raises = RaisesAtLine(in_place, n)
        assert raises.run(save), n
        where = f"line {raises.where}"
        assert exists == path.exists() or path.read_bytes() == new, where
        assert num_descriptors() == before or is_inseparable(in_place, raises.where), where
        save()
        assert path.read_bytes() == new, where


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_whose_handler_raises(number, options, tmp_path):
    """At random moments of saves of 40 MiB, mostly in the middle of the writing."""
    path = tmp_path / "in" / "model.pt"
    path.parent.mkdir()
    obj = {"weight": torch.ones(10 << 20)}
    sio.save(obj, path, **options)
    new, interrupted = path.read_bytes(), 0
    before = threading.active_count()

    def raise_interruption(*_):
        raise Interruption

    previous = signal.signal(number, raise_interruption)
    try:
        for i in range(120):
            if i >= 12 and interrupted > 3:  # a busy machine is late with the timers, or quick with the saves
                break
            path.write_bytes(OLD)
            killer = threading.Timer(0.002 + i % 12 * 0.003, os.kill, (os.getpid(), number))
            try:
                killer.start()
                sio.save(obj, path, **options)
                assert path.read_bytes() == new
                killer.join()
            except Interruption:
                interrupted += 1
                killer.join()
            assert path.read_bytes() in (OLD, new)
            assert os.listdir(path.parent) == ["model.pt"]
    finally:
        signal.signal(number, previous)
    assert interrupted > 3
    # Not the descriptors: an exception that comes up when os.open() has returned takes its result with it.
    # A worker that its executor could not wait for ends by itself.
    deadline = time.monotonic() + 30
    while threading.active_count() != before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert threading.active_count() == before


def test_a_native_save_hears_ctrl_c_at_once(tmp_path):
    """Not after the last byte."""
    require_native()
    path, seen = tmp_path / "model.pt", []

    def interrupt(done, total):
        seen.append((done, total))
        os.kill(os.getpid(), signal.SIGINT)

    def raise_interruption(*_):
        raise Interruption

    previous = signal.signal(signal.SIGINT, raise_interruption)
    try:
        with pytest.raises(Interruption):
            sio.save({"weight": torch.ones(100 << 20)}, path, progress=interrupt, backend="native")
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(seen) <= 2
    assert seen[0][0] < seen[0][1], "the save was over before it looked for signals: make it larger"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["disk", "/dev/shm"])
@pytest.mark.parametrize("durable", [True, False])
def test_a_timer_of_1_khz_does_not_disturb(durable, place, options, tmp_path):
    """EINTR in whatever is slow, preallocation too, again and again."""
    if place != "disk":
        if not os.access(place, os.W_OK):
            pytest.skip(f"no {place}")
        tmp_path = replacement.os.path.join(place, f"timer-{os.getpid()}")
        os.mkdir(tmp_path)
    path, ticks = os.path.join(tmp_path, "model.pt"), []
    obj = {"weight": torch.arange(25 << 20, dtype=torch.int32)}
    previous = signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    signal.siginterrupt(signal.SIGALRM, True)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        started = time.monotonic()
        sio.save(obj, path, durable=durable, **options)
        seconds = time.monotonic() - started
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert torch.equal(torch.load(path)["weight"], obj["weight"])
        assert ticks and seconds > 0.005, f"{len(ticks)} ticks in {seconds:.3f} s"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if place != "disk":
            shutil.rmtree(tmp_path)
