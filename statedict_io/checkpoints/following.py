"""What comes after an asynchronous save: done by a thread for each, which the interpreter's exit waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ..writing import pending
from ..writing.pending import PendingSave


class PendingCheckpoint(PendingSave):
    """An asynchronous save into a directory. It is done when the directory is in order too, as after ``save``.

    Args:
        may_wait: whether this thread may wait for the directory: not in a signal handler that has come up while it puts
            the directory in order itself.
    """

    def __init__(self, saved: PendingSave, may_wait: Callable[[], bool]) -> None:
        super().__init__(saved._save)
        self._may_wait = may_wait
        self._is_over = threading.Event()

    def done(self) -> bool:
        return self.has_been_saved() and self._is_over.is_set()

    def has_been_saved(self) -> bool:
        """Whether the save itself has ended, well or not."""
        return super().done()

    def follow(self, action: Callable[[bool], None]) -> None:
        """Calls ``action``, with whether the checkpoint is there, when the save has ended."""
        try:
            super()._wait(None)
            action(self._save.error is None)
        finally:
            self._is_over.set()

    def _wait(self, timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        if not super()._wait(timeout):
            return False
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        return not self._may_wait() or self._is_over.wait(left)


class Followings:
    """Of one directory. Used from any thread, and by a signal handler in the middle of another call."""

    def __init__(self, may_wait: Callable[[], bool]) -> None:
        self._may_wait = may_wait
        self.start_anew()

    def start_anew(self) -> None:
        """In a forked child, where the threads are not."""
        self._lock = threading.RLock()
        self._known: list[PendingCheckpoint] = []  # that were not done when they were looked at last

    def begin(self, saved: PendingSave, action: Callable[[bool], None]) -> PendingCheckpoint:
        """Has ``action`` called as by :meth:`PendingCheckpoint.follow`."""
        checkpoint = PendingCheckpoint(saved, self._may_wait)
        with self._lock:
            self._known.append(checkpoint)
        thread = threading.Thread(target=checkpoint.follow, args=(action,), name=f"after {saved.path}", daemon=False)
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter is about to end
            checkpoint.follow(action)
        return checkpoint

    def catch_up(self) -> None:
        """Waits for what comes after saves that have ended, so that deletions keep pace with saves.

        Raises:
            Exception: the error of a save that nobody has asked for.
        """
        with self._lock:
            ended = [each for each in self._known if each.has_been_saved()]
        for each in ended:
            each._wait(None)
            with self._lock:
                if each not in self._known or not each.done():
                    continue
                self._known.remove(each)
            pending.raise_if_failed(each)

    def wait(self, timeout: float | None) -> bool:
        """Whether everything has ended; errors stay to be asked for."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            known = list(self._known)
        return all(each._wait(None if deadline is None else max(deadline - time.monotonic(), 0.0)) for each in known)
