"""One warning a process that something here is slower than what was installed for."""

from __future__ import annotations

import sys
import threading
import warnings

from ..errors import SlowerWarning

# Whose frames are not the line that a user could change.
_NOT_THE_CALLER = (__name__.partition(".")[0], "torch", "contextlib", "functools", "threading", "concurrent")

_told = threading.Lock()  # by who has taken it, for good


def has_warned() -> bool:
    """Whether this process has been told."""
    return _told.locked()


def warn(reason: str) -> None:
    """Warns, the first time in a process, at the line that called into this package or into torch.

    Args:
        reason: what is slower, why, and the cure.

    Raises:
        SlowerWarning: where warnings are errors. It is not raised again, so that a second attempt succeeds.
    """
    if not _told.acquire(blocking=False):
        return
    warnings.warn(f"statedict_io is slower than it could be: {reason}", SlowerWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """As :func:`warnings.warn` in :func:`warn` counts it; of the outermost frame where there is no other."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and _top_package(frame.f_globals.get("__name__")) in _NOT_THE_CALLER:
        frame = frame.f_back
        level += 1
    return level


def _top_package(name: object) -> str:
    return name.partition(".")[0] if isinstance(name, str) else ""
