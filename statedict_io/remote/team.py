"""Threads that carry out actions, some at once, while the thread that gives them waits."""

from __future__ import annotations

import threading
from collections.abc import Callable

Action = Callable[[], object]

_WAKE_SECONDS = 1.0  # Windows delivers no signal to a thread that waits for ever


class Team:
    """Actions are begun in the order in which they are given. After the first error none is begun any more, but the
    last one. Given actions, and waited for, by one thread.

    The threads are no daemons: the interpreter's exit waits for the last action.

    Args:
        size: most actions at once; a thread for each is started when there is need for it.
        name: of the threads.
    """

    def __init__(self, size: int, name: str) -> None:
        #: held where :attr:`error` and what actions share is changed or looked at
        self.changed = threading.Condition()
        self.error: BaseException | None = None  #: the first
        self._size = size
        self._name = name
        self._threads: list[threading.Thread] = []
        self._given: list[Action] = []
        self._num_running = 0
        self._num_waiting = 0
        self._last: Action | None = None
        self._is_closed = False

    def give(self, action: Action) -> None:
        with self.changed:
            if self.error is not None:
                return
            self._given.append(action)
            self.changed.notify()
            is_short = len(self._given) > self._num_waiting and len(self._threads) < self._size
        if is_short and not self._has_new_thread() and not self._threads:
            self._work(until_idle=True)

    def is_idle(self) -> bool:
        """To be asked with :attr:`changed` held."""
        return not self._given and not self._num_running

    def wait(self, is_so: Callable[[], bool], meanwhile: Action = lambda: None) -> None:
        """Returns when ``is_so()``, which is asked with :attr:`changed` held.

        Args:
            meanwhile: called in between, and at the end.

        Raises:
            BaseException: the first error of an action.
        """
        while True:
            with self.changed:
                if self.error is not None:
                    raise self.error
                is_over = is_so()
                if not is_over:
                    self.changed.wait(_WAKE_SECONDS)
            meanwhile()
            if is_over:
                return

    def end(self, last: Action | None = None) -> None:
        """Drops what has not begun, waits for what has, and then for ``last``. If this is interrupted, ``last`` is
        carried out all the same.

        Raises:
            BaseException: the error of ``last``.
        """
        errors: list[BaseException] = []

        def noting_error() -> None:
            if last is not None:
                try:
                    last()
                except BaseException as e:
                    errors.append(e)

        with self.changed:
            self._given.clear()
            self._last = noting_error
            self._is_closed = True
            self.changed.notify_all()
            is_short = last is not None and not self._threads
        if is_short and not self._has_new_thread():
            self._work()
        for thread in self._threads:
            while thread.is_alive():
                thread.join(_WAKE_SECONDS)
        if errors:
            raise errors[0]

    def _has_new_thread(self) -> bool:
        """False where none can be had: of the system, or at the interpreter's exit."""
        thread = threading.Thread(target=self._work, name=self._name, daemon=False)
        self._threads.append(thread)
        try:
            thread.start()
        except RuntimeError:
            self._threads.remove(thread)
            return False
        return True

    def _work(self, until_idle: bool = False) -> None:
        while (action := self._next(until_idle)) is not None:
            error = None
            try:
                action()
            except BaseException as e:
                error = e
            del action  # and what it holds
            with self.changed:
                self._num_running -= 1
                if error is not None and self.error is None:
                    self.error = error
                    self._given.clear()
                self.changed.notify_all()

    def _next(self, until_idle: bool) -> Action | None:
        with self.changed:
            while not self._given and not self._is_closed and not until_idle:
                self._num_waiting += 1
                try:
                    self.changed.wait()
                finally:
                    self._num_waiting -= 1
            action = None
            if self._given:
                action = self._given.pop(0)
            elif self._is_closed and self._num_running == 0:
                action, self._last = self._last, None
            if action is not None:
                self._num_running += 1
            return action
