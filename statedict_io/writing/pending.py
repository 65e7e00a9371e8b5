"""Saves in flight: what the caller holds of one, and the register of all.

Nobody waits for himself: a signal handler, a progress callback or a ``__reduce__`` may save while its thread is inside
another save. Such an outer save cannot end before the inner one, so no wait includes it. Before its own commit it waits
for the later calls that went first, and leaves the file alone where one of them has been committed.

The register bounds them, keeps those of one path in order, and loses no error: one that nobody asked for is raised by
the next ``save_async`` to the path, or printed when the interpreter exits.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol

from ..errors import SnapshotLimitError, StateDictIOError
from ..system.processes import in_forked_child


class HeldSnapshot(Protocol):
    def done(self) -> bool: ...
    def wait(self) -> None: ...
    def release(self) -> None: ...


@dataclass(frozen=True)
class Limits:
    max_in_flight: int
    max_snapshot_nbytes: int  #: in host memory, of all saves in flight together
    when_full: Literal["wait", "raise"]


class Call:
    """One call of ``save`` or ``save_async``, around all that it does, in the calling thread; around the writing of an
    asynchronous one too, in the thread that writes."""

    def __init__(self) -> None:
        self.file: Callable[[], str] | None = None  #: what it writes, once that is known
        self.save: PendingSave | None = None  #: of an asynchronous one in flight
        self.committed = False
        self.thread = 0  # that is inside of it
        self.has_returned = False
        self.overtaken_by: list[Call] = []  #: calls that began later and did not wait for this one
        self.num_inner_waits = 0  # of calls that this one's thread is inside of, on top of it

    def __enter__(self) -> Call:
        self.thread = threading.get_ident()
        if _running.calls:
            with _register.lock:
                for outer in _own_calls():
                    outer.overtaken_by.append(self)
        _running.calls.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _running.calls.remove(self)
        self.has_returned = True
        if _running.calls or _register.in_flight:  # one of which may have let this one go first
            _register.notify()

    def is_over(self) -> bool:
        return self.has_returned if self.save is None else self.save._has_ended

    def is_superseded(self) -> bool:
        """Whether a call that began later has committed the same file; waits for those that still may."""
        if not self.overtaken_by or self.file is None:
            return False
        file = self.file()
        later = [call for call in self.overtaken_by if call.file is not None and call.file() == file]
        _register.wait(lambda: all(call.is_over() for call in later), own=self)
        return any(call.committed for call in later)

    def gives_way(self) -> bool:
        """Whether something that has to end first waits on top of it, in the same thread."""
        return self.num_inner_waits > 0


class _Running(threading.local):
    def __init__(self) -> None:
        self.calls: list[Call] = []  #: of this thread, the outermost first


_running = _Running()


def _own_calls() -> list[Call]:
    """Those that this thread is inside of, and that have not gone over to a thread that writes."""
    me = threading.get_ident()
    return [call for call in _running.calls if call.thread == me]


def _own_saves() -> list[PendingSave]:
    """Saves in flight that cannot end while this thread waits."""
    return [call.save for call in _own_calls() if call.save is not None]


class PendingSave:
    """A save that :func:`~statedict_io.save_async` started.

    Every method may be called from any thread of the process that started it. Where that thread is the one that writes
    this save, in a progress callback, asking for its result raises :class:`StateDictIOError`. As a context manager it
    waits for the save at the end of the block, and raises its error unless the block raised one.
    """

    def __init__(self, path: str, file: str, call: Call) -> None:
        self.path = path  #: as given to save_async
        self._file = file  #: what path leads to
        self._process = os.getpid()
        self._claimed = threading.Lock()  # by who will end it
        self._has_ended = False
        self._call = call
        self._error: BaseException | None = None
        # Of a save in flight:
        self._nbytes = 0  # of host memory
        self._device_nbytes: dict[str, int] = {}
        self._predecessor: PendingSave | None = None
        self._snapshot: HeldSnapshot | None = None

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._process == os.getpid() and self._has_ended

    def result(self, timeout: float | None = None) -> None:
        """Waits until the file is there, and durable if that was asked for. If a later call to the same path was
        committed first, that call's file is there, as durable as it asked for.

        Args:
            timeout: in seconds; None: as long as it takes.

        Raises:
            TimeoutError: the file is not there after ``timeout`` seconds; the save goes on.
            Exception: the save's error; the old file is whole, unless ``atomic=False``.
        """
        if (error := self.exception(timeout)) is not None:
            raise error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits as :meth:`result` does, and returns the save's error or None.

        Args:
            timeout: in seconds; None: as long as it takes.

        Raises:
            TimeoutError: the save has not ended after ``timeout`` seconds; it goes on.
        """
        self._check_process()
        if not self._wait(timeout):
            raise TimeoutError(f"the save to {self.path!r} has not ended after {timeout} s")
        _register.collect(self)
        return self._error

    def snapshot_done(self) -> bool:
        """Whether the state has been copied; False only after ``save_async(wait_snapshot=False)``."""
        self._check_process()
        snapshot = self._snapshot
        return snapshot is None or snapshot.done()

    def wait_snapshot(self) -> None:
        """Returns when the state has been copied: from then on the tensors may be changed on any stream.

        Raises:
            RuntimeError: what the device reports.
        """
        self._check_process()
        if (snapshot := self._snapshot) is not None:
            snapshot.wait()

    def __enter__(self) -> PendingSave:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.result()
        else:
            self._wait(None)  # the body's error comes first; this save's is reported later if there is one

    def __repr__(self) -> str:
        state = "in flight" if not self.done() else "done" if self._error is None else f"failed: {self._error!r}"
        return f"<PendingSave {self.path!r}: {state}>"

    def _wait(self, timeout: float | None) -> bool:
        if not self._has_ended and self in _own_saves():
            raise StateDictIOError(
                f"the save to {self.path!r} cannot end while the thread that makes it waits for it: ask in "
                "another thread, or after the callback or signal handler has returned"
            )
        return _register.wait(lambda: self._has_ended, timeout)

    def _has_ended_or_gives_way(self) -> bool:
        return self._has_ended or self._call.gives_way()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise StateDictIOError(
                f"the save to {self.path!r} belongs to process {self._process}, of which this is a forked child"
            )


class _Register:
    def __init__(self) -> None:
        # Entered by itself: a signal's exception in the condition's __enter__, which is Python, would leave it locked.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.in_flight: list[PendingSave] = []  # in the order of the calls
        self.uncollected: list[PendingSave] = []  # ended in an error that nobody asked for

    def admit(self, save: PendingSave, nbytes: int, device_nbytes: dict[str, int], limits: Limits) -> None:
        with self.lock:
            while self._full(nbytes, limits, [] if limits.when_full == "raise" else _own_saves()):
                if limits.when_full == "raise":
                    held = sum(other._nbytes for other in self.in_flight)
                    raise SnapshotLimitError(
                        f"save_async({save.path!r}): {len(self.in_flight)} saves in flight (max_in_flight="
                        f"{limits.max_in_flight}) hold {held} bytes, and this one needs {nbytes} "
                        f"(max_snapshot_nbytes={limits.max_snapshot_nbytes})"
                    )
                self.wait(lambda: not self._full(nbytes, limits, _own_saves()), own=save._call)
            save._nbytes, save._device_nbytes = nbytes, device_nbytes
            save._predecessor = self._last(save._file)
            self.in_flight.append(save)
            save._call.save = save

    def wait(self, condition: Callable[[], bool], timeout: float | None = None, own: Call | None = None) -> bool:
        """Whether ``condition`` has come true. Saves of other threads that wait for one that this thread is inside of,
        other than ``own``, need not wait for it meanwhile."""
        outer = [call for call in _own_calls() if call is not own]
        with self.lock:
            for call in outer:
                call.num_inner_waits += 1
            try:
                if outer:
                    self.changed.notify_all()
                return self.changed.wait_for(condition, timeout)
            finally:
                for call in outer:
                    call.num_inner_waits -= 1

    def notify(self) -> None:
        with self.lock:
            self.changed.notify_all()

    def wait_for_turn(self, call: Call, last: PendingSave | None) -> None:
        """Returns when ``last`` and all before it to the same file have ended, but for those that cannot before."""
        while last is not None:
            save, before = last, last._predecessor
            if call not in save._call.overtaken_by:
                self.wait(save._has_ended_or_gives_way, own=call)
                with self.lock:
                    if save._has_ended:
                        return
                    save._call.overtaken_by.append(call)
            last = before

    def _full(self, nbytes: int, limits: Limits, ignored: list[PendingSave]) -> bool:
        counted = [save for save in self.in_flight if save not in ignored]
        held = sum(save._nbytes for save in counted)
        return len(counted) >= limits.max_in_flight or (nbytes > 0 and held + nbytes > limits.max_snapshot_nbytes)

    def _last(self, file: str) -> PendingSave | None:
        return next((save for save in reversed(self.in_flight) if save._file == file), None)

    def last_of(self, file: str) -> PendingSave | None:
        with self.lock:
            return self._last(file)

    def device_nbytes(self, device: str) -> int:
        with self.lock:
            return sum(save._device_nbytes.get(device, 0) for save in self.in_flight)

    def resize(self, save: PendingSave, nbytes: int, limits: Limits) -> bool:
        with self.lock:
            others = sum(other._nbytes for other in self.in_flight if other is not save)
            fits = others + nbytes <= limits.max_snapshot_nbytes
            save._nbytes, save._device_nbytes = nbytes if fits else 0, {}
            self.changed.notify_all()
            return fits

    def finish(self, save: PendingSave, error: BaseException | None) -> None:
        # Before anybody hears of the end: who waits for memory, or looks at it, finds it given back.
        snapshot, save._snapshot = save._snapshot, None
        if snapshot is not None:
            snapshot.release()
        with self.lock:
            save._error = error
            if error is not None:
                self.uncollected.append(save)
            if save in self.in_flight:
                self.in_flight.remove(save)
            save._nbytes, save._device_nbytes, save._predecessor = 0, {}, None
            save._has_ended = True
            self.changed.notify_all()

    def collect(self, pending: PendingSave) -> None:
        with self.lock:
            if pending in self.uncollected:
                self.uncollected.remove(pending)

    def take_uncollected(self, file: str | None = None) -> PendingSave | None:
        with self.lock:
            for i, save in enumerate(self.uncollected):
                if file is None or save._file == file:
                    return self.uncollected.pop(i)
        return None

    def wait_until_empty(self, timeout: float | None) -> bool:
        own = _own_saves()
        return self.wait(lambda: all(save in own for save in self.in_flight), timeout)


_register = _Register()


def admit(save: PendingSave, nbytes: int, device_nbytes: dict[str, int], limits: Limits) -> None:
    """Puts ``save`` in flight, waiting while the limits are met.

    Args:
        nbytes: of host memory that its snapshot will take.
        device_nbytes: the same of each device.

    Raises:
        SnapshotLimitError: they are, and ``limits.when_full`` is "raise".
    """
    _register.admit(save, nbytes, device_nbytes, limits)


def resize(save: PendingSave, nbytes: int, limits: Limits) -> bool:
    """Whether there is host memory for a snapshot of another size than was admitted; without waiting, and holding none
    where there is not."""
    return _register.resize(save, nbytes, limits)


def claim(save: PendingSave) -> bool:
    """Whether it is the caller who has to :func:`finish` the save: True once."""
    return save._claimed.acquire(blocking=False)


def wait_for_predecessor(save: PendingSave) -> None:
    """Returns when saves to the same file that were started before it have ended, but for those that this thread is
    inside of."""
    _register.wait_for_turn(save._call, save._predecessor)


def ended_well(save: PendingSave) -> bool:
    """Waits for the save's end; whether the file is there. Its error stays to be asked for, or reported."""
    save._check_process()
    save._wait(None)
    return save._error is None


def finish(save: PendingSave, error: BaseException | None) -> None:
    """Ends the save. ``error`` is its own; None also where the call raises it."""
    _register.finish(save, error)
    if _exit_has_been_reported:
        _report_uncollected()


def device_nbytes_in_flight(device: str) -> int:
    return _register.device_nbytes(device)


def any_in_flight() -> bool:
    return bool(_register.in_flight)


def wait_for_earlier(call: Call, file: str) -> None:
    """Returns when no save to ``file`` that was started before the call is in flight, but for those that this thread is
    inside of: the last call wins."""
    _register.wait_for_turn(call, _register.last_of(file))


def current_call() -> Call:
    """The innermost that this thread is inside of."""
    return _running.calls[-1]


def raise_uncollected(save: PendingSave) -> None:
    """Raises the error of an earlier save to the same file if nobody has asked for it."""
    failed = _register.take_uncollected(save._file)
    if failed is None or failed._error is None:
        return
    if hasattr(failed._error, "add_note"):
        failed._error.add_note(
            f"This is the error of an earlier save_async to {failed.path!r}, which nobody had asked for. "
            "The call that raised it has not started a save: call again."
        )
    raise failed._error


def wait_all(timeout: float | None = None) -> None:
    """Waits for every save in flight. Called by a signal handler, a progress callback or the like, it does not wait for
    the save that this thread is in the middle of.

    Args:
        timeout: in seconds, of all together; None: as long as it takes.

    Raises:
        TimeoutError: some are still in flight; they go on.
        Exception: the error of the first save that failed and was never checked. Errors of others are raised by the
            next call, or reported at exit.
    """
    if not _register.wait_until_empty(timeout):
        raise TimeoutError(f"{len(_register.in_flight) - len(_own_saves())} saves have not ended after {timeout} s")
    failed = _register.take_uncollected()
    if failed is not None and failed._error is not None:
        raise failed._error


def exit_has_begun() -> bool:
    """Whether threads that are started now would not be waited for."""
    return _exit_has_begun


_exit_has_begun = _exit_has_been_reported = False


def _at_exit() -> None:
    global _exit_has_begun
    _exit_has_begun = True
    _register.wait_until_empty(None)
    _report_uncollected()


def _at_last() -> None:
    global _exit_has_been_reported
    _at_exit()
    _exit_has_been_reported = True


def _report_uncollected() -> None:
    while (failed := _register.take_uncollected()) is not None:
        when = time.strftime("%H:%M:%S")
        print(f"statedict_io: {when}: an asynchronous save failed, and nobody asked for its error", file=sys.stderr)
        if failed._error is not None:
            traceback.print_exception(type(failed._error), failed._error, failed._error.__traceback__)


def _start_anew() -> None:
    """In a forked child: its parent's saves are not its own, and their locks may be held for ever."""
    global _register
    _register = _Register()
    for call in _running.calls:
        call.save, call.overtaken_by, call.num_inner_waits = None, [], 0


in_forked_child(_start_anew)
# The threads that write are no daemons, so exit waits for them anyway. Processes of multiprocessing leave by os._exit
# and run no atexit functions, but these.
if hasattr(threading, "_register_atexit"):
    threading._register_atexit(_at_exit)
atexit.register(_at_last)
