"""A directory held open: names in it keep their meaning when the working directory changes, when a directory on the way
is renamed, and where a path to it from the root may not be walked or would be too long."""

from __future__ import annotations

import os
import re

from ..descriptors import open_file

_DESCRIPTORS = re.compile(r"/proc/.*/fd")


class Directory:
    """Closed by :meth:`close`, or when nothing refers to it any more.

    Args:
        path: of the directory; relative to ``below``, or else to the working directory as it is now.
        below: another one, which stays open.

    Raises:
        OSError: it cannot be opened.
    """

    __slots__ = ("facts", "fd", "path")

    fd: int  #: -1 once it is closed
    path: str  #: a name for it, good as long as nothing moves; relative where it was given so
    facts: os.stat_result  #: of the moment in which it was opened

    def __init__(self, path: str, below: Directory | None = None) -> None:
        self.fd = -1
        self.path = path if below is None else os.path.join(below.path, path)
        self.fd = _opened(path, None if below is None else below.fd)
        try:
            self.facts = os.fstat(self.fd)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            try:  # noqa: SIM105
                os.close(fd)
            except OSError:  # nothing was written through it
                pass

    def __del__(self) -> None:
        self.close()

    @property
    def identity(self) -> str:
        """Equal for all names of the directory, through links and bind mounts; needs no look at any of them."""
        return f"{self.facts.st_dev:x}:{self.facts.st_ino:x}"

    def look_at(self, name: str) -> os.stat_result | None:
        """What ``name`` is, links not followed; None where there is no such name."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def is_of_descriptors(self) -> bool:
        """Whether this is a process's ``/proc/PID/fd``: its links lead to what is already open."""
        return _DESCRIPTORS.fullmatch(self.location) is not None

    @property
    def location(self) -> str:
        """Where it is now, as far as the system tells."""
        try:
            return os.readlink(f"/proc/self/fd/{self.fd}")
        except OSError:  # no /proc
            return self.path

    def paths_of(self, name: str) -> list[str]:
        """Paths of a file in it, for other processes: the first is absolute if there is such a path, the second the one
        that was given, which may work where the first does not."""
        given = os.path.join(self.path, name)
        try:
            return list(dict.fromkeys([os.path.join(os.getcwd(), given), given]))
        except OSError:
            return [given]


def _opened(path: str, below: int | None) -> int:
    flags = os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return open_file(path, os.O_RDONLY | flags, dir_fd=below)
    except PermissionError:
        if not hasattr(os, "O_PATH"):
            raise
        # Searchable and writable but not readable: good for all but a list of its names and fsync.
        return open_file(path, os.O_PATH | flags, dir_fd=below)
