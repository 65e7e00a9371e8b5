"""What the ``f`` of a save is: a file to replace, a path to stream to, a URL, or an object to write to.

Everything that can be refused is refused here, before an object is pickled or a file opened, with the error that
``torch.save`` raises.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import stat
from dataclasses import dataclass
from typing import Any

import torch
import torch.serialization

from .errors import refused_target
from .remote.stores import Place, is_url, locate

_MAX_SYMLINKS = 40  # as the kernel


@dataclass(slots=True)  # frozen would take 14 us to make where nothing is in the cache, this 4
class FileTarget:
    """A name that a finished file will be moved to."""

    given: str  #: the path as the caller spelled it; error messages name it
    path: str  #: absolute; not itself a symlink: that stays, and what it points to is replaced
    archive_name: str
    existing: os.stat_result | None

    @property
    def identity(self) -> str:
        """Equal for all spellings of the path: without symlinks on the way either."""
        directory, name = os.path.split(self.path)
        return os.path.join(os.path.realpath(directory), name)


@dataclass(frozen=True)
class PathStreamTarget:
    """A path with no file to replace: a device, a FIFO, a descriptor of this process."""

    given: str
    archive_name: str


@dataclass(frozen=True)
class ObjectTarget:
    """A caller's object: only ``write`` and ``flush`` are called."""

    given: Any
    archive_name: str = "archive"


@dataclass(frozen=True)
class URLTarget:
    """An object of a store, replaced as the store can."""

    given: str
    place: Place
    archive_name: str

    @property
    def identity(self) -> str:
        """Equal for all URLs of the object, and no path of a file."""
        return self.place.identity


Target = FileTarget | PathStreamTarget | URLTarget | ObjectTarget


def resolve(f: Any, *, names_archive: bool = True) -> Target:
    """Classifies ``f`` as ``torch.save`` would take it.

    Args:
        f: as given to ``save``. Of a URL nothing is asked of the store here.
        names_archive: whether the path must yield an archive name; the legacy format has none.

    Raises:
        AttributeError, TypeError, RuntimeError, OSError: as ``torch.save(obj, f)``. Paths that the system refuses
        raise an error that
            is both torch's ``RuntimeError`` and the fitting ``OSError``.
    """
    if isinstance(f, (str, os.PathLike)):
        f = os.fspath(f)
    else:
        torch.serialization._check_save_filelike(f)
    if is_url(f):
        return _resolve_url(f, names_archive)
    if isinstance(f, str):
        return _resolve_path(f, names_archive)
    if not callable(getattr(f, "write", None)):
        torch.serialization._open_zipfile_writer_buffer(f)  # raises torch's error
    if isinstance(f, io.IOBase) and not f.closed and not f.writable():
        f.write(b"")  # raises io.UnsupportedOperation
    if not hasattr(f, "flush"):
        f.flush  # noqa: B018 - torch would find out after writing everything
    return ObjectTarget(f)


@functools.lru_cache(maxsize=64)  # many saves go to one path
def archive_name_of(path: str) -> str:
    """torch's archive name: the part after the last slash or backslash, less its last extension.

    ``PyTorchFileWriter`` takes ASCII paths only; others go through a Python file, for which torch uses ``archive``.
    """
    if not path.isascii():
        return "archive"
    base = path[max(path.rfind("/"), path.rfind("\\")) + 1 :]
    dot = base.rfind(".")
    return base if dot < 0 else base[:dot]


def _resolve_url(url: str, names_archive: bool) -> Target:
    place = locate(url)
    if place.local_path is not None:
        return _resolve_path(place.local_path + "/" * url.endswith("/"), names_archive)
    if url.endswith("/") or not place.file_name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), place.url)
    archive_name = archive_name_of(place.file_name)
    if not archive_name and names_archive:
        raise RuntimeError(f"invalid file name: {place.url}")  # torch's words
    return URLTarget(place.url, place, archive_name)


def _resolve_path(given: str, names_archive: bool) -> Target:
    if "\0" in given:
        raise ValueError("embedded null byte")
    archive_name = archive_name_of(given)
    if not archive_name and names_archive:
        torch.serialization._open_zipfile_writer_file(given)  # raises torch's "invalid file name"
        raise RuntimeError(f"invalid file name: {given}")
    if not given:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), given)
    parent_is_there = names_archive and _check_parent(given)
    try:
        return _look_at(given, archive_name, parent_is_there)
    except OSError as e:
        if not names_archive or not given.isascii():  # torch opens these with open(), whose error this is
            raise type(e)(e.errno, e.strerror, given) from None
        raise refused_target(e, given, f"open file failed with strerror: {e.strerror}") from None


def _look_at(given: str, archive_name: str, parent_is_there: bool) -> Target:
    """Raises the OSError, without a path, that opening ``given`` for writing would."""
    if given.endswith("/"):
        os.stat(os.path.dirname(given.rstrip("/")) or os.curdir)
        raise _system_error(errno.EISDIR)
    path = given if given.startswith("/") else os.path.join(os.getcwd(), given)
    existing = _lstat(path)
    if existing is not None and stat.S_ISLNK(existing.st_mode):
        target = _follow_symlinks(path)
        if target is None:
            return PathStreamTarget(given, archive_name)
        path, existing, parent_is_there = target, _lstat(target), False
    if existing is None:
        if not parent_is_there:
            os.stat(os.path.dirname(path))  # raises where it is the directory that is missing, or cannot be looked at
        return FileTarget(given, path, archive_name, None)
    if stat.S_ISDIR(existing.st_mode):
        raise _system_error(errno.EISDIR)
    if not stat.S_ISREG(existing.st_mode):
        return PathStreamTarget(given, archive_name)
    if not os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        # Why not (EACCES, EROFS, ESTALE, ...) only open() tells; it changes nothing, and where it is allowed so are we.
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    return FileTarget(given, path, archive_name, existing)


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))  # of the subclass that fits


def _check_parent(given: str) -> bool:
    """torch looks at the text before the last slash (or, without one, the last backslash). False: at nothing."""
    if not given.isascii():
        return False
    end = given.rfind("/") if "/" in given else given.rfind("\\")
    if end <= 0:
        return False
    parent = given[:end]
    try:
        if not stat.S_ISDIR(os.stat(parent).st_mode):
            raise _system_error(errno.ENOTDIR)
    except OSError as e:
        # torch says so whatever the reason.
        reason = "" if isinstance(e, FileNotFoundError) else f" ({e.strerror})"
        raise refused_target(e, given, f"Parent directory {parent} does not exist.{reason}") from None
    return True


def _follow_symlinks(path: str) -> str | None:
    """The absolute path that ``path`` ends at, or None where it names a descriptor of a process.

    ``/dev/stdout`` and ``/proc/self/fd/3`` are links too, but to something already open: what is there must be written
    to, not replaced.
    """
    for _ in range(_MAX_SYMLINKS):
        directory, base = os.path.split(path)
        directory = os.path.realpath(directory)
        path = os.path.join(directory, base)
        if directory.startswith("/proc/") and directory.endswith("/fd"):
            return None
        try:
            link = os.readlink(path)
        except OSError as e:
            if e.errno in (errno.EINVAL, errno.ENOENT):
                return path
            raise
        path = os.path.join(directory, link)
    raise _system_error(errno.ELOOP)
