"""Locks that end with the process that holds them, however that ends: by flock(), where the system and the file system
have it.

The lock belongs to an open file. Other descriptors of the file may be opened and closed, here and elsewhere, without
ending it (a lock of fcntl() would end with the first of them). A child that is forked shares it: it lasts until parent
and child have closed the file. Who does not ask for a lock is not hindered by one, except on SMB (man 2 flock).
"""

from __future__ import annotations

import contextlib

from .descriptors import fcntl


def hold(fd: int, *, waits: bool = False) -> bool:
    """Locks an open file or directory until it is closed.

    Args:
        fd: open for writing: NFS wants that.
        waits: for a lock that another holds.

    Returns:
        False where that cannot be done.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def let_go(fd: int) -> None:
    """Ends what :func:`hold` began, for forked children too."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)


def is_held(fd: int) -> bool | None:
    """Whether another open file has the lock; None where that cannot be told."""
    locked = try_lock(fd, shared=True)  # shared: for that NFS takes a file that is open for reading
    return None if locked is None else not locked


def try_lock(fd: int, *, shared: bool) -> bool | None:
    """Locks an open file until it is closed, if no other open file has it locked; False: one has; None: that cannot be
    done.

    Args:
        shared: others may lock it so too. Otherwise ``fd`` has to be open for writing: NFS wants that.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
