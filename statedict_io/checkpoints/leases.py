"""Leases: a checkpoint that somebody reads is not deleted.

In this process a table tells. Other processes see a shared lock on the checkpoint itself, where the file system has
locks; where it has none, and in stores, a checkpoint may be deleted under a reader of another process, which then looks
for the newest one again.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import threading
from types import TracebackType

from ..system import locks
from ..system.descriptors import NONBLOCK, open_file
from ..system.processes import in_forked_child
from .folder import Folder

_table_lock = threading.RLock()
_held: collections.Counter[tuple[str, str]] = collections.Counter()
_descriptors: set[int] = set()


class Lease:
    """Of one checkpoint, while its block runs.

    Raises:
        FileNotFoundError: it is gone, or another process is deleting it just now.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder = folder
        self._key = (folder.identity, name)
        self._path = folder.path_of(name)
        self._fd = -1
        self._process = 0

    def __enter__(self) -> Lease:
        self._process = os.getpid()
        with _table_lock:
            _held[self._key] += 1
        try:
            if self._folder.is_local:
                self._lock()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _lock(self) -> None:
        try:
            fd = open_file(self._path, os.O_RDONLY | NONBLOCK)
        except FileNotFoundError:
            raise
        except OSError:
            return  # reading it will say what is wrong
        self._fd = fd
        _descriptors.add(fd)
        if locks.hold(fd, shared=True) is False:
            raise FileNotFoundError(errno.ENOENT, "is just being deleted", self._path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process != os.getpid():  # a child that was forked in the block
            return
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _descriptors.discard(fd)
            with contextlib.suppress(OSError):
                os.close(fd)
        with _table_lock:
            _held[self._key] -= 1
            if _held[self._key] <= 0:
                del _held[self._key]


def is_held(folder: Folder, name: str) -> bool:
    """Whether this process has a lease of it. Others are seen by trying to lock the checkpoint exclusively."""
    with _table_lock:
        return (folder.identity, name) in _held


def _let_go_in_child() -> None:
    global _table_lock
    _table_lock = threading.RLock()
    _held.clear()
    for fd in _descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)
    _descriptors.clear()


in_forked_child(_let_go_in_child)
