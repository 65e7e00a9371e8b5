"""The saves in flight of this process: whose turn it is, how many there may be, and which have failed.

Nobody waits for himself: a signal handler, a progress callback or a ``__reduce__`` may save while its thread is inside
another save. Such an outer save cannot end before the inner one, so no wait includes it. Before its own commit it waits
for the later calls that went first, and leaves the file alone where one of them has been committed.

The :data:`register` bounds them, keeps those of one path in order, and keeps those whose error nobody has asked for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from ..errors import SnapshotLimitError
from ..system.file_digest import FileDigest
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
        self.save: SaveInFlight | None = None  #: of an asynchronous one in flight
        self.committed = False
        self.thread = 0  # that is inside of it
        self.has_returned = False
        self.overtaken_by: list[Call] = []  #: calls that began later and did not wait for this one
        self.num_inner_waits = 0  # of calls that this one's thread is inside of, on top of it

    def __enter__(self) -> Call:
        self.thread = threading.get_ident()
        if _running.calls:
            with register.lock:
                for outer in _own_calls():
                    outer.overtaken_by.append(self)
        _running.calls.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _running.calls.remove(self)
        self.has_returned = True
        if _running.calls or register.in_flight:  # one of which may have let this one go first
            register.notify()

    def is_over(self) -> bool:
        return self.has_returned if self.save is None else self.save.has_ended

    def is_superseded(self) -> bool:
        """Whether a call that began later has committed the same file; waits for those that still may."""
        if not self.overtaken_by or self.file is None:
            return False
        file = self.file()
        later = [call for call in self.overtaken_by if call.file is not None and call.file() == file]
        register.wait(lambda: all(call.is_over() for call in later), own=self)
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


def own_saves() -> list[SaveInFlight]:
    """Saves in flight that cannot end while this thread waits."""
    return [call.save for call in _own_calls() if call.save is not None]


class SaveInFlight:
    """One asynchronous save, from its call on. What is public here is changed by the register, but for the snapshot."""

    def __init__(self, path: str, file: str, call: Call, digest: FileDigest | None = None) -> None:
        self.path = path  #: as given to save_async
        self.file = file  #: what path leads to
        self.process = os.getpid()
        self.call = call
        self.digest = digest  #: what is wanted of the file's bytes; complete when the save has ended well
        self.has_ended = False
        self.error: BaseException | None = None  #: known when it has ended
        self._claimed = threading.Lock()  # by who will end it
        # While it is in flight:
        self.nbytes = 0  #: of host memory
        self.device_nbytes: dict[str, int] = {}
        self.predecessor: SaveInFlight | None = None  #: the save to the same file before this one
        self.snapshot: HeldSnapshot | None = None

    def claim(self) -> bool:
        """Whether it is the caller who has to end the save: True once."""
        return self._claimed.acquire(blocking=False)

    def wait_snapshot(self) -> None:
        if (snapshot := self.snapshot) is not None:
            snapshot.wait()

    def ended_or_gives_way(self) -> bool:
        return self.has_ended or self.call.gives_way()


class Register:
    """May be used from any thread."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Also in a forked child: its parent's saves are not its own, and their locks may be held for ever."""
        # Entered by itself: a signal's exception in the condition's __enter__, which is Python, would leave it locked.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.in_flight: list[SaveInFlight] = []  # in the order of the calls
        self.uncollected: list[SaveInFlight] = []  # ended in an error that nobody asked for

    def admit(self, save: SaveInFlight, nbytes: int, device_nbytes: dict[str, int], limits: Limits) -> None:
        """Puts ``save`` in flight, waiting while the limits are met.

        Args:
            nbytes: of host memory that its snapshot will take.
            device_nbytes: the same of each device.

        Raises:
            SnapshotLimitError: they are, and ``limits.when_full`` is "raise".
        """
        with self.lock:
            while self._full(nbytes, limits, [] if limits.when_full == "raise" else own_saves()):
                if limits.when_full == "raise":
                    held = sum(other.nbytes for other in self.in_flight)
                    raise SnapshotLimitError(
                        f"save_async({save.path!r}): {len(self.in_flight)} saves in flight (max_in_flight="
                        f"{limits.max_in_flight}) hold {held} bytes, and this one needs {nbytes} "
                        f"(max_snapshot_nbytes={limits.max_snapshot_nbytes})"
                    )
                self.wait(lambda: not self._full(nbytes, limits, own_saves()), own=save.call)
            save.nbytes, save.device_nbytes = nbytes, device_nbytes
            save.predecessor = self._last(save.file)
            self.in_flight.append(save)
            save.call.save = save

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

    def wait_for_predecessor(self, save: SaveInFlight) -> None:
        """Returns when saves to the same file that were started before it have ended, but for those that this thread is
        inside of."""
        self._wait_for_turn(save.call, save.predecessor)

    def wait_for_earlier(self, call: Call, file: str) -> None:
        """Returns when no save to ``file`` that was started before the call is in flight, but for those that this
        thread is inside of: the last call wins."""
        with self.lock:
            last = self._last(file)
        self._wait_for_turn(call, last)

    def _wait_for_turn(self, call: Call, last: SaveInFlight | None) -> None:
        """Returns when ``last`` and all before it to the same file have ended, but for those that cannot before."""
        while last is not None:
            save, before = last, last.predecessor
            if call not in save.call.overtaken_by:
                self.wait(save.ended_or_gives_way, own=call)
                with self.lock:
                    if save.has_ended:
                        return
                    save.call.overtaken_by.append(call)
            last = before

    def _full(self, nbytes: int, limits: Limits, ignored: list[SaveInFlight]) -> bool:
        counted = [save for save in self.in_flight if save not in ignored]
        held = sum(save.nbytes for save in counted)
        return len(counted) >= limits.max_in_flight or (nbytes > 0 and held + nbytes > limits.max_snapshot_nbytes)

    def _last(self, file: str) -> SaveInFlight | None:
        return next((save for save in reversed(self.in_flight) if save.file == file), None)

    def device_nbytes(self, device: str) -> int:
        """Of the snapshots on a device."""
        with self.lock:
            return sum(save.device_nbytes.get(device, 0) for save in self.in_flight)

    def resize(self, save: SaveInFlight, nbytes: int, limits: Limits) -> bool:
        """Whether there is host memory for a snapshot of another size than was admitted; without waiting, and holding
        none where there is not."""
        with self.lock:
            others = sum(other.nbytes for other in self.in_flight if other is not save)
            fits = others + nbytes <= limits.max_snapshot_nbytes
            save.nbytes, save.device_nbytes = nbytes if fits else 0, {}
            self.changed.notify_all()
            return fits

    def finish(self, save: SaveInFlight, error: BaseException | None) -> None:
        # Before anybody hears of the end: who waits for memory, or looks at it, finds it given back.
        snapshot, save.snapshot = save.snapshot, None
        if snapshot is not None:
            snapshot.release()
        with self.lock:
            save.error = error
            if error is not None:
                self.uncollected.append(save)
            if save in self.in_flight:
                self.in_flight.remove(save)
            save.nbytes, save.device_nbytes, save.predecessor = 0, {}, None
            save.has_ended = True
            self.changed.notify_all()

    def collect(self, save: SaveInFlight) -> None:
        """Its error, if there is one, has been asked for."""
        with self.lock:
            if save in self.uncollected:
                self.uncollected.remove(save)

    def take_uncollected(self, file: str | None = None) -> SaveInFlight | None:
        """The first save, to ``file`` where that is given, whose error nobody has asked for; once."""
        with self.lock:
            for i, save in enumerate(self.uncollected):
                if file is None or save.file == file:
                    return self.uncollected.pop(i)
        return None

    def wait_until_empty(self, timeout: float | None) -> bool:
        """Whether all saves have ended within ``timeout`` seconds, but for those that this thread is inside of."""
        own = own_saves()
        return self.wait(lambda: all(save in own for save in self.in_flight), timeout)


register = Register()


def current_call() -> Call:
    """The innermost that this thread is inside of."""
    return _running.calls[-1]


def _start_anew() -> None:
    register.start_anew()
    for call in _running.calls:
        call.save, call.overtaken_by, call.num_inner_waits = None, [], 0


in_forked_child(_start_anew)
