"""Requests side by side, in several threads. The calling thread looks after progress and signals.

A request that is late is sent a second time when all others have been sent: whichever is answered first counts, and the
other one is ended.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from .interrupts import Interrupt

_TICK_SECONDS = 0.05
#: A request is late when it takes so many times as long as others of its size, of which so many are done.
_LATE_FACTOR = 3
_LATE_SECONDS = 1.0
_NUM_OTHERS = 4
_MAX_SIMULTANEOUS = 2  #: of one request
# Threads that write nothing any more are waited for so long, and end by themselves.
_PATIENCE_SECONDS = 1.0


class Request(Protocol):
    nbytes: int
    counted_nbytes: int  #: what it adds to progress

    def send(self, interrupt: Interrupt) -> None:
        """Sends it and takes the answer. May be called a second time, in another thread, while the first goes on."""

    def finish(self) -> None:
        """Called once, when nobody writes any more."""


def perform(requests: Sequence[Request], num_threads: int, tick: Callable[[int], object] | None = None) -> None:
    """Sends ``requests``, in their order, at most ``num_threads`` at one time.

    Args:
        tick: called in this thread again and again, and at the end, with the progress. What it raises ends all others,
            as does the first error, or a signal's handler (KeyboardInterrupt).

    Raises:
        Exception: the first that a request raises.
    """
    if len(requests) == 1:
        requests[0].send(Interrupt())
        requests[0].finish()
        if tick is not None:
            tick(requests[0].counted_nbytes)
        return
    _Team(requests).run(num_threads, tick or (lambda done: None))


class _Running:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.start = time.monotonic()
        self.interrupts: list[Interrupt] = []  #: of those who send it
        self.is_answered = False


class _Team:
    def __init__(self, requests: Sequence[Request]) -> None:
        self._queue = iter(requests)
        self._changed = threading.Condition()
        # All of these under that lock:
        self._num_left = len(requests)
        self._nbytes_done = 0
        self._running: set[_Running] = set()
        self._seconds: list[tuple[int, float]] = []  #: (nbytes, how long it took)
        self._num_threads = 0
        self._error: BaseException | None = None
        self._is_over = False

    def run(self, num_threads: int, tick: Callable[[int], object]) -> None:
        try:
            for _ in range(min(num_threads, self._num_left)):
                with self._changed:
                    self._num_threads += 1
                try:
                    threading.Thread(target=self._work, name="statedict_io request", daemon=True).start()
                except RuntimeError:  # no more threads, or the interpreter is exiting
                    with self._changed:
                        self._num_threads -= 1
                    break
            if self._num_threads == 0 and self._num_left:
                self._num_threads += 1
                self._work()
            while True:
                with self._changed:
                    if self._num_left and self._error is None:
                        self._changed.wait(_TICK_SECONDS)
                    done, is_over = self._nbytes_done, not self._num_left or self._error is not None
                tick(done)
                if is_over:
                    break
        finally:
            self._end()
        if self._error is not None:
            raise self._error

    def _end(self) -> None:
        with self._changed:
            self._is_over = True
            interrupts = [interrupt for running in self._running for interrupt in running.interrupts]
            self._changed.notify_all()
        for interrupt in interrupts:
            interrupt.set()
        with self._changed:
            self._changed.wait_for(lambda: self._num_threads == 0, _PATIENCE_SECONDS)
            self._changed.wait_for(lambda: not any(interrupt.is_writing for interrupt in self._interrupts()))

    def _interrupts(self) -> list[Interrupt]:
        return [interrupt for running in self._running for interrupt in running.interrupts]

    def _work(self) -> None:
        try:
            while (found := self._next()) is not None:
                self._send(*found)
        except BaseException as e:
            with self._changed:
                self._error = self._error or e
        finally:
            with self._changed:
                self._num_threads -= 1
                self._changed.notify_all()

    def _next(self) -> tuple[_Running, Interrupt] | None:
        """What this thread does next; None where there is nothing."""
        with self._changed:
            while not self._is_over and self._error is None and self._num_left:
                request = next(self._queue, None)
                if request is not None:
                    running: _Running | None = _Running(request)
                else:
                    running = self._late()
                if running is not None:
                    self._running.add(running)
                    running.interrupts.append(Interrupt())
                    return running, running.interrupts[-1]
                self._changed.wait(_TICK_SECONDS)
        return None

    def _late(self) -> _Running | None:
        now = time.monotonic()
        for running in self._running:
            if running.is_answered or not 0 < len(running.interrupts) < _MAX_SIMULTANEOUS:
                continue
            nbytes = running.request.nbytes
            others = [seconds for size, seconds in self._seconds if size <= 2 * nbytes and nbytes <= 2 * size]
            if len(others) < _NUM_OTHERS:
                continue
            if now - running.start > max(_LATE_FACTOR * statistics.median(others), _LATE_SECONDS):
                return running
        return None

    def _send(self, running: _Running, interrupt: Interrupt) -> None:
        error: BaseException | None = None
        try:
            with interrupt.of_this_thread():
                running.request.send(interrupt)
        except BaseException as e:
            error = e
        with self._changed:
            running.interrupts.remove(interrupt)
            self._changed.notify_all()
            others = [*running.interrupts]
            if running.is_answered or self._is_over:
                return  # the other one was faster, or nobody waits any more
            if error is not None:
                if others:
                    return  # it may be luckier
                raise error
            running.is_answered = True
            self._seconds.append((running.request.nbytes, time.monotonic() - running.start))
        for each in others:
            each.set()
        with self._changed:
            self._changed.wait_for(lambda: not any(each.is_writing for each in running.interrupts))
        running.request.finish()
        with self._changed:
            self._running.discard(running)
            self._num_left -= 1
            self._nbytes_done += running.request.counted_nbytes
            self._changed.notify_all()
