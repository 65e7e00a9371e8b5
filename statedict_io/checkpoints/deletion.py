"""Deleting checkpoints that nobody reads.

A checkpoint goes before its facts: a process that dies in between leaves facts without a checkpoint, which the next
save removes. The names go in the call. The blocks of a file go when its last descriptor is closed, which can take as
long as writing them did: that is left to a thread, with a descriptor that was opened before.
"""

from __future__ import annotations

import contextlib
import os

from ..system import locks
from ..system.descriptors import NOFOLLOW, NONBLOCK, open_file
from . import facts, leases
from .background import Background
from .folder import Folder


class Deletions:
    """Used by one thread at a time."""

    def __init__(self, folder: Folder, background: Background) -> None:
        self._folder = folder
        self._background = background
        self._held: set[int] = set()  # descriptors of what has been deleted

    def delete(self, name: str) -> None:
        """Of a checkpoint and its facts, unless somebody reads it.

        Raises:
            OSError: it cannot be deleted.
        """
        if leases.is_held(self._folder, name):
            return
        for each in (name, name + facts.SUFFIX):
            fd = self._opened(each)
            try:
                if each == name and fd >= 0 and locks.hold(fd) is False:
                    self._close(fd)
                    return
                self._remove(each, fd)
            except BaseException:
                self._close(fd)  # at once: it is locked
                raise
            self._close_later(fd)

    def _remove(self, name: str, fd: int) -> None:
        try:
            self._folder.remove(name)
        except PermissionError:
            if os.name != "nt" or fd < 0:
                raise
            self._close(fd)  # Windows deletes nothing that is open
            self._folder.remove(name)

    def _opened(self, name: str) -> int:
        """-1 where it cannot be opened, or is a link: that is removed, and not what it leads to."""
        if self._folder.is_local:
            for access in (os.O_RDWR, os.O_RDONLY):  # NFS locks exclusively what may be written only
                with contextlib.suppress(OSError):
                    fd = open_file(self._folder.path_of(name), access | NONBLOCK | NOFOLLOW)
                    self._held.add(fd)
                    return fd
        return -1

    def _close_later(self, fd: int) -> None:
        if fd in self._held:
            self._background.run(lambda: self._close(fd))

    def _close(self, fd: int) -> None:
        if fd in self._held:
            self._held.discard(fd)
            with contextlib.suppress(OSError):
                os.close(fd)

    def start_anew(self) -> None:
        """In a forked child, which would keep the blocks."""
        for fd in list(self._held):
            self._close(fd)
