"""Signals that ask a run to stop: a flag for the loop, and a save where one is wanted."""

from __future__ import annotations

import contextlib
import signal
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from ..system.processes import in_forked_child

_installed: weakref.WeakSet[StopSignals] = weakref.WeakSet()


class StopSignals:
    """Handlers of signals, until :meth:`restore`. To be made and restored in the main thread.

    Args:
        act: called in the handler.
        owner: without whom ``act`` is not called; not kept alive by this.
    """

    def __init__(self, signals: tuple[int, ...], act: Callable[[Any], object], owner: object) -> None:
        self._act = act
        self._owner = weakref.ref(owner)
        self._before: dict[int, Any] = {}
        _installed.add(self)
        try:
            for number in signals:
                self._before[number] = signal.signal(number, self._handle)
        except BaseException:
            self.restore()
            raise

    def _handle(self, number: int, frame: FrameType | None) -> None:
        owner = self._owner()
        if owner is not None:
            self._act(owner)
        before = self._before.get(number)
        if callable(before) and before is not signal.default_int_handler:  # such as another library's
            before(number, frame)

    def restore(self) -> None:
        """Puts back the handlers that were there, unless others have come meanwhile."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _restore_in_child() -> None:
    """A worker that a signal should end must not take it for a wish of the run's."""
    for each in list(_installed):
        with contextlib.suppress(ValueError):  # not the main thread, which takes no signals
            each.restore()


in_forked_child(_restore_in_child)
