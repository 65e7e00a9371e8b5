"""Tasks in the calling thread and on several, for :mod:`~statedict_io.backends.python_reading`.

The calling thread looks after progress and signals; nothing outlives a call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from ..progress import ProgressCallback

_SIGNAL_SECONDS = 0.05

#: returns the number of bytes that are done with it
Task = Callable[[], int]


def task(nbytes: int, action: Callable[..., None], *arguments: Any) -> Task:
    def perform() -> int:
        action(*arguments)
        return nbytes

    return perform


def perform(
    alone: list[Task], together: list[Task], total: int, progress: ProgressCallback | None, num_threads: int
) -> None:
    """Runs ``alone`` in this thread, then ``together`` on ``num_threads``. ``progress`` is called in this thread with
    the sum of what they return; the first error, also of ``progress``, ends the rest."""
    done = 0
    for each in alone:
        done += each()
        if progress is not None:
            progress(done, total)
    if not together:
        return
    lock = threading.Lock()
    queue = iter(together)
    stopped = False

    def work() -> None:
        nonlocal done, stopped
        while not stopped:
            with lock:
                each = next(queue, None)
            if each is None:
                return
            try:
                nbytes = each()
            except BaseException:
                stopped = True
                raise
            with lock:
                done += nbytes

    pool = ThreadPoolExecutor(min(num_threads, len(together)))
    try:
        workers: set[Future[None]] = set()
        try:
            while len(workers) < min(num_threads, len(together)):
                workers.add(pool.submit(work))
        except RuntimeError:  # no more threads, or the interpreter is exiting
            if not workers:
                work()
        pending = workers
        while pending:
            _, pending = wait(pending, timeout=_SIGNAL_SECONDS, return_when=FIRST_EXCEPTION)
            if progress is not None:
                progress(done, total)
        for worker in workers:
            worker.result()
    finally:
        stopped = True
        pool.shutdown()
