"""One writer a directory: a locked file in it, which says who that is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time

from ..errors import CheckpointDirectoryInUseError
from ..system import locks
from ..system.descriptors import NOFOLLOW, open_file, read_at, write_at

NAME = ".statedict-io.lock"
_MAX_ATTEMPTS = 100  # another one may remove the file between our opening it and locking it
_MAX_NBYTES = 1 << 12


class WriterLock:
    """Of a local directory, which is there. Let go by :meth:`release`, and by the end of the process."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._path = os.path.join(directory, NAME)
        self._fd = -1
        self._process = os.getpid()

    def acquire(self) -> bool:
        """Whether it is held from now on; False where the file system has no locks.

        Raises:
            CheckpointDirectoryInUseError: another process holds it, or another object of this one.
            OSError: the file can be neither opened nor made.
        """
        for _ in range(_MAX_ATTEMPTS):
            fd = self._opened()
            if fd < 0:
                continue
            try:
                locked = locks.hold(fd)
                if locked is False:
                    raise CheckpointDirectoryInUseError(self._refusal(fd))
                if locked is None:
                    with contextlib.suppress(OSError):
                        os.unlink(self._path)
                    return False
                if not self._is_still_there(fd):
                    continue
                self._say_who(fd)
                self._fd, fd, self._process = fd, -1, os.getpid()
                return True
            finally:
                if fd >= 0:
                    os.close(fd)
        raise CheckpointDirectoryInUseError(f"{self._directory}: other processes take turns in locking it; try again")

    def _opened(self) -> int:
        """-1 where it has just been removed. One that another user has left, who was killed, can only be read: that is
        enough for flock()."""
        try:
            return open_file(self._path, os.O_RDWR | os.O_CREAT | NOFOLLOW, 0o666)
        except PermissionError:
            if not os.path.lexists(self._path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self._directory) from None
            with contextlib.suppress(FileNotFoundError):
                return open_file(self._path, os.O_RDONLY | NOFOLLOW)
            return -1

    def release(self) -> None:
        """Again: does nothing."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            if self._process == os.getpid() and self._is_still_there(fd):
                with contextlib.suppress(OSError):
                    os.unlink(self._path)  # while it is locked: whoever has opened it looks whether it is still there
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)

    def forget(self) -> None:
        """In a forked child: the lock stays its parent's."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _is_still_there(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._path, follow_symlinks=False), os.fstat(fd))
        except FileNotFoundError:
            return False

    def _say_who(self, fd: int) -> None:
        """Only for the message that others get."""
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S%z")}
        data = json.dumps(who).encode()
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            write_at(fd, data, 0)

    def _refusal(self, fd: int) -> str:
        who = "another process"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(read_at(fd, _MAX_NBYTES, 0))
            pid, host = int(found["pid"]), str(found["host"])
            ours = pid == os.getpid() and host == socket.gethostname()
            whose = "another CheckpointDirectory of this process" if ours else f"process {pid} on {host}"
            who = f"{whose}, since {found['since']},"
        return (
            f"{self._directory}: {who} saves checkpoints here, and two would delete each other's; close() that one or "
            "let it end, use another directory, or pass allow_other_writers=True where that is wanted"
        )
