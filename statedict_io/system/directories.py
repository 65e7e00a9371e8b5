"""A directory held open: names in it keep their meaning when the working directory changes, when a directory on the way
is renamed, and where a path to it from the root may not be walked or would be too long.

Systems without descriptors of directories (Windows) have its absolute path in place of that.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import unicodedata
from typing import Any

from .descriptors import DIRECTORY, NOFOLLOW, NONBLOCK, open_file, sync

_DESCRIPTORS = re.compile(r"/proc/.*/fd")
_HAS_DESCRIPTORS = DIRECTORY != 0  # not os.supports_dir_fd, which lacks functions that somebody has wrapped
_PC_CASE_SENSITIVE = 11  # macOS, sys/unistd.h; os.pathconf_names has it not


class OpenDirectory:
    """Closed by :meth:`close`, or when nothing refers to it any more. Names in it are looked up in the directory that
    it was when it was opened.

    Args:
        path: of the directory; relative to ``below``, or else to the working directory as it is now.
        below: another one, which stays open.
        follows: whether ``path`` may be a symlink.

    Raises:
        OSError: it cannot be opened.
    """

    __slots__ = ("_base", "_tells_case_apart", "facts", "fd", "path")

    fd: int  #: -1 once it is closed, and on systems without descriptors of directories
    path: str  #: a name for it, good as long as nothing moves; relative where it was given so
    facts: os.stat_result  #: of the moment in which it was opened

    def __init__(self, path: str, below: OpenDirectory | None = None, *, follows: bool = True) -> None:
        self.fd = -1
        self._base: str | None = None  # its absolute path, where that stands for it; None too once it is closed
        self.path = path if below is None else os.path.join(below.path, path)
        if not _HAS_DESCRIPTORS:
            base = os.path.abspath(path if below is None else below._name(path))
            self.facts = os.stat(base, follow_symlinks=follows)
            if not stat.S_ISDIR(self.facts.st_mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), base)
            self._base = base
            self._tells_case_apart = os.name != "nt"
            return
        self.fd = _opened(path, None if below is None else below.fd, 0 if follows else NOFOLLOW)
        try:
            self.facts = os.fstat(self.fd)
            self._tells_case_apart = sys.platform != "darwin" or _tells_case_apart(self.fd)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._base = None
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            try:  # noqa: SIM105
                os.close(fd)
            except OSError:  # nothing was written through it
                pass

    @property
    def is_closed(self) -> bool:
        return self.fd < 0 and self._base is None

    def __del__(self) -> None:
        self.close()

    def _name(self, name: str) -> str:
        """For calls with the options ``_at``. Those fail once it is closed: they must not reach what has got its
        descriptor's number since, nor the working directory."""
        if _HAS_DESCRIPTORS:
            return name
        if self._base is None:
            raise _closed_error()
        return os.path.join(self._base, name)

    @property
    def _at(self) -> dict[str, Any]:
        return {"dir_fd": self.fd} if _HAS_DESCRIPTORS else {}

    @property
    def identity(self) -> str:
        """Equal for all names of the directory, through links and bind mounts; needs no look at any of them."""
        return f"{self.facts.st_dev:x}:{self.facts.st_ino:x}"

    def identity_of(self, name: str) -> str:
        """Equal for all spellings of a file's path."""
        return f"{self.identity}/{name if self._tells_case_apart else _folded(name)}"

    # What is done with names in it. All raise OSError.

    def look_at(self, name: str) -> os.stat_result | None:
        """What ``name`` is, links not followed; None where there is no such name."""
        try:
            return os.stat(self._name(name), follow_symlinks=False, **self._at)
        except FileNotFoundError:
            return None

    def open(self, name: str, flags: int, mode: int = 0o777) -> int:
        return open_file(self._name(name), flags, mode, **self._at)

    def check_exists(self, name: str) -> None:
        os.stat(self._name(name), **self._at)

    def check_writable(self, name: str) -> None:
        """Raises what opening the file for writing would."""
        if not os.access(self._name(name), os.W_OK, effective_ids=os.access in os.supports_effective_ids, **self._at):
            # Why not (EACCES, EROFS, ESTALE, ...) only open() tells; it changes nothing, and where it is allowed so
            # are we.
            os.close(self.open(name, os.O_WRONLY | NONBLOCK))

    def read_link(self, name: str) -> str:
        return os.readlink(self._name(name), **self._at)

    def move(self, name: str, new_name: str) -> None:
        """Atomically in the place of what is there."""
        at = {"src_dir_fd": self.fd, "dst_dir_fd": self.fd} if _HAS_DESCRIPTORS else {}
        os.replace(self._name(name), self._name(new_name), **at)

    def link(self, name: str, new_name: str) -> None:
        """Another name for a file."""
        at: dict[str, Any] = {"src_dir_fd": self.fd, "dst_dir_fd": self.fd} if _HAS_DESCRIPTORS else {}
        os.link(self._name(name), self._name(new_name), **at)

    def remove_file(self, name: str) -> None:
        os.unlink(self._name(name), **self._at)

    def empty_file(self, name: str) -> None:
        os.close(self.open(name, os.O_WRONLY | os.O_TRUNC | NOFOLLOW | NONBLOCK))

    def names(self) -> list[str]:
        if self.is_closed:  # os.listdir(-1) lists the working directory
            raise _closed_error()
        return os.listdir(self.fd if self._base is None else self._base)

    def sync(self) -> None:
        """Has the names in it on the device. Windows has no call for that: there they are as safe as its file system
        makes them."""
        if self.is_closed:
            raise _closed_error()
        if self._base is not None:
            return
        try:
            sync(self.fd)
        except OSError as e:
            if e.errno != errno.EBADF:
                raise
            os.sync()  # opened with O_PATH

    def is_of_descriptors(self) -> bool:
        """Whether this is a process's ``/proc/PID/fd``: its links lead to what is already open."""
        return _DESCRIPTORS.fullmatch(self.location) is not None

    @property
    def location(self) -> str:
        """Where it is now, as far as the system tells."""
        if self._base is not None:
            return self._base
        try:
            return os.readlink(f"/proc/self/fd/{self.fd}")
        except OSError:  # no /proc
            return self.path

    def path_of(self, name: str) -> str:
        """For code of this process that opens files by path."""
        if self._base is None:
            through_descriptor = f"/proc/self/fd/{self.fd}"
            if os.path.isdir(through_descriptor):
                return os.path.join(through_descriptor, name)
        return os.path.join(self._base or self.path, name)

    def paths_of(self, name: str) -> list[str]:
        """Paths of a file in it, for other processes: the first is absolute if there is such a path, the second the one
        that was given, which may work where the first does not."""
        given = os.path.join(self.path, name)
        try:
            return list(dict.fromkeys([os.path.join(os.getcwd(), given), given]))
        except OSError:
            return [given]


def split(path: str) -> tuple[str, str]:
    """A path's directory, without the slash at its end unless it is the root, and its last part; as the system reads
    it: with drive letters and backslashes on Windows."""
    drive, rest = os.path.splitdrive(path)
    name_at = 1 + max(rest.rfind(separator) for separator in SEPARATORS)
    parent = rest[: name_at - 1] if name_at > 1 else rest[:name_at]
    return drive + parent, rest[name_at:]


SEPARATORS = os.sep + (os.altsep or "")


def _closed_error() -> OSError:
    return OSError(errno.EBADF, os.strerror(errno.EBADF))


def _opened(path: str, below: int | None, flags: int) -> int:
    flags |= DIRECTORY
    try:
        return open_file(path, os.O_RDONLY | flags, dir_fd=below)
    except PermissionError:
        if not hasattr(os, "O_PATH") or (below is not None and flags & NOFOLLOW):  # a private one is always readable
            raise
        # Searchable and writable but not readable: good for all but a list of its names and fsync.
        return open_file(path, os.O_PATH | flags, dir_fd=below)


def _tells_case_apart(fd: int) -> bool:
    """Of a volume of macOS."""
    try:
        return os.pathconf(fd, _PC_CASE_SENSITIVE) != 0
    except (OSError, ValueError):
        return False  # as most there


def _folded(name: str) -> str:
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()
