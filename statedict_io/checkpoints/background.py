"""What need not be waited for: done by a thread, one after the other, before the interpreter exits."""

from __future__ import annotations

import collections
import sys
import threading
import time
from collections.abc import Callable


class Background:
    """Used from any thread, and by a signal handler in the middle of another call.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.start_anew()

    def start_anew(self) -> None:
        """In a forked child, where the thread is not: what it has not done is its parent's."""
        self._lock = threading.RLock()
        self._actions: collections.deque[Callable[[], None]] = collections.deque()
        self._thread: threading.Thread | None = None

    def run(self, action: Callable[[], None]) -> None:
        """Has the thread call ``action``, which raises nothing; calls it here where there can be no thread."""
        with self._lock:
            self._actions.append(action)
            if self._thread is not None:
                return
            self._thread = thread = threading.Thread(target=self._work, name=self._name, daemon=False)
            try:
                thread.start()
                return
            except RuntimeError:  # no more threads, or the interpreter is about to end
                self._thread = None
        self._work()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether everything has been done; waits so many seconds for that, None: as long as it takes."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                thread = self._thread
            if thread is None:
                return True
            thread.join(None if deadline is None else max(deadline - time.monotonic(), 0))
            if thread.is_alive():
                return False

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._actions:
                    self._thread = None
                    return
                action = self._actions.popleft()
            try:
                action()
            except Exception:  # such as a warning that is an error
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
