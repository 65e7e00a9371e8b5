"""Locks that end with the process that holds them, however that ends: by flock(), where the system and the file system
have it.

The lock belongs to an open file. Other descriptors of the file may be opened and closed, here and elsewhere, without
ending it (a lock of fcntl() would end with the first of them). A child that is forked shares it: it lasts until parent
and child have closed the file. Who does not ask for a lock is not hindered by one, except on SMB (man 2 flock).
"""

from __future__ import annotations

import contextlib

from .descriptors import fcntl


def hold(fd: int, *, shared: bool = False, waits: bool = False) -> bool | None:
    """Locks an open file or directory until it is closed.

    Args:
        shared: others may hold it so too. Otherwise ``fd`` has to be open for writing: NFS wants that.
        waits: for a lock that another open file has.

    Returns:
        False where another open file has it, None where that cannot be done.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def let_go(fd: int) -> None:
    """Ends what :func:`hold` began, for forked children too."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)


def is_held(fd: int) -> bool | None:
    """Whether another open file has the lock; None where that cannot be told."""
    held = hold(fd, shared=True)  # shared: for that NFS takes a file that is open for reading
    return None if held is None else not held
