"""Temporaries whose writers are gone: removed by the next save of the same path. docs/reliability.md says when.

A writer locks its temporary right after it has made it; the system ends the lock with the writer. A name is random and
used once, so what it leads to does not change between a look at it and its removal.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from ..system import locks
from ..system.descriptors import NOFOLLOW, NONBLOCK
from ..system.directories import OpenDirectory
from .temporary_names import TemporaryNames

#: Younger ones may not be locked yet, or their lock may not be seen by this machine.
YOUNG_SECONDS = 60
_UNLOCKED_SECONDS = 24 * 3600


def remove_leftovers(directory: OpenDirectory, names: TemporaryNames, own: str) -> None:
    """Removes what earlier saves have left. Never an error: it is in nobody's way.

    Args:
        names: of the target's temporaries.
        own: the one that this save has just made. Its time is now by the clock of the file system, which the times of
            the others are by, and which may be another machine's.
    """
    try:
        found = [name for name in directory.names() if names.has(name) and name != own]
    except OSError:
        return
    now = None
    for name in found:
        with contextlib.suppress(OSError):
            if now is None:
                now = _last_write(directory, own)
            if _is_left_over(directory, name, now, names.are_locked(name)):
                directory.remove_file(name)


def remove_unlocked(directory: OpenDirectory, name: str) -> None:
    """Removes a temporary however young it is, unless its writer lives; for who knows that nobody is between making one
    and locking it. Never an error."""
    with contextlib.suppress(OSError):
        if _is_held(directory, name) is not True:
            directory.remove_file(name)


def remove_if_left_over(directory: OpenDirectory, name: str, fresh: str) -> None:
    """Removes a temporary of any target, as :func:`remove_leftovers` does. Never an error.

    Args:
        fresh: a file that has just been written.
    """
    with contextlib.suppress(OSError):
        if _is_left_over(directory, name, _last_write(directory, fresh), True):
            directory.remove_file(name)


def renew(fd: int) -> None:
    """Makes a temporary as young as one that has just been made: while it is closed and not yet renamed, no lock
    protects it."""
    if os.utime in os.supports_fd:
        with contextlib.suppress(OSError):
            os.utime(fd)


def _is_left_over(directory: OpenDirectory, name: str, now: float, is_locked: bool) -> bool:
    age = now - _last_write(directory, name)
    if age < YOUNG_SECONDS:
        return False
    is_held = _is_held(directory, name) if is_locked else None
    return age > _UNLOCKED_SECONDS if is_held is None else not is_held


def _last_write(directory: OpenDirectory, name: str) -> float:
    """
    Raises:
        OSError: it cannot be looked at, or is no file.
    """
    facts = directory.look_at(name)
    if facts is None or not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    return facts.st_mtime


def _is_held(directory: OpenDirectory, name: str) -> bool | None:
    try:
        fd = directory.open(name, os.O_RDONLY | NOFOLLOW | NONBLOCK)
    except OSError:  # another user's
        return None
    try:
        return locks.is_held(fd)
    finally:
        os.close(fd)
