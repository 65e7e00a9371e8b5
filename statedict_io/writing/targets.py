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
from typing import TYPE_CHECKING, Any

import torch
import torch.serialization

from ..errors import refused_target
from ..remote.urls import is_url
from ..system.directories import SEPARATORS, OpenDirectory, split

if TYPE_CHECKING:
    from ..remote.stores import Place

_MAX_SYMLINKS = 40  # as the kernel


@dataclass(slots=True)  # frozen would take 14 us to make where nothing is in the cache, this 4
class FileTarget:
    """A name that a finished file will be moved to."""

    given: str  #: the path as the caller spelled it; error messages name it
    directory: OpenDirectory  #: the name's, where it was when the target was resolved
    name: str  #: not itself a symlink: that stays, and what it points to is replaced
    archive_name: str
    existing: os.stat_result | None

    @property
    def file_name(self) -> str:
        return self.name

    @property
    def identity(self) -> str:
        """Equal for all spellings of the path; also after :meth:`close`."""
        return self.directory.identity_of(self.name)

    def close(self) -> None:
        """Lets go of the directory: the target can be written no more."""
        self.directory.close()


@dataclass(slots=True)
class PathStreamTarget:
    """A path with no file to replace: a device, a FIFO, a descriptor of this process."""

    given: str
    directory: OpenDirectory  #: the name's, where it was when the target was resolved
    name: str
    archive_name: str

    @property
    def identity(self) -> str:
        """Equal for all spellings of the path; also after :meth:`close`."""
        return self.directory.identity_of(self.name)

    def open(self) -> io.FileIO:
        """For writing, unbuffered."""
        return io.FileIO(self.name, "w", opener=self._open)

    def _open(self, name: str, flags: int) -> int:
        return self.directory.open(name, flags, 0o666)

    def close(self) -> None:
        """Lets go of the directory: the target can be written no more."""
        self.directory.close()


@dataclass(frozen=True)
class ObjectTarget:
    """A caller's object: only ``write`` and ``flush`` are called."""

    given: Any
    archive_name: str = "archive"

    def close(self) -> None:
        """The object stays open: it is the caller's."""


@dataclass(frozen=True)
class URLTarget:
    """An object of a store, replaced as the store can."""

    given: str
    place: Place
    archive_name: str

    @property
    def file_name(self) -> str:
        return self.place.file_name

    @property
    def identity(self) -> str:
        """Equal for all URLs of the object, and no path of a file."""
        return self.place.identity

    def close(self) -> None:
        """Nothing is open yet."""


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
    elif hasattr(torch.serialization, "_check_save_filelike"):
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
    from ..remote.stores import locate

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
    try:
        if names_archive and given.isascii() and "/" not in given and os.sep == "/":
            _check_parent_before_backslash(given)
        return _look_at(given, archive_name, names_archive)
    except OSError as e:
        if isinstance(e, RuntimeError):  # in torch's words already
            raise
        if not names_archive or not given.isascii():  # torch opens these with open(), whose error this is
            raise type(e)(e.errno, e.strerror, given) from None
        raise refused_target(e, given, f"open file failed with strerror: {e.strerror}") from None


def _look_at(given: str, archive_name: str, names_archive: bool) -> Target:
    """Raises the OSError, without a path, that opening ``given`` for writing would."""
    if given[-1] in SEPARATORS:
        os.stat(os.path.dirname(given.rstrip(SEPARATORS)) or os.curdir)
        raise _system_error(errno.EISDIR)
    parent, name = split(given)
    try:
        directory = OpenDirectory(parent or os.curdir)
    except OSError as e:
        if parent and names_archive and given.isascii() and e.errno not in (errno.EMFILE, errno.ENFILE):
            raise _no_parent(e, given, parent) from None
        raise
    try:
        for _ in range(_MAX_SYMLINKS):
            existing = directory.look_at(name)
            if existing is None or not stat.S_ISLNK(existing.st_mode):
                return _target(given, directory, name, archive_name, existing)
            if directory.is_of_descriptors():  # what is there is open: it must be written to, not replaced
                return PathStreamTarget(given, directory, name, archive_name)
            directory, name = _followed(directory, directory.read_link(name))
        raise _system_error(errno.ELOOP)
    except BaseException:
        directory.close()
        raise


def _target(
    given: str, directory: OpenDirectory, name: str, archive_name: str, existing: os.stat_result | None
) -> FileTarget | PathStreamTarget:
    if existing is None:
        if directory.facts.st_nlink == 0 and directory.path == os.curdir:
            os.getcwd()  # raises where it has been removed: nothing can be created there
        return FileTarget(given, directory, name, archive_name, None)
    if stat.S_ISDIR(existing.st_mode):
        raise _system_error(errno.EISDIR)
    if not stat.S_ISREG(existing.st_mode):
        return PathStreamTarget(given, directory, name, archive_name)
    directory.check_writable(name)
    return FileTarget(given, directory, name, archive_name, existing)


def _followed(directory: OpenDirectory, link: str) -> tuple[OpenDirectory, str]:
    """Where a symlink in ``directory``, which is closed if it is another, leads to."""
    parent, name = split(link)
    if not name:
        directory.check_exists(link)
        raise _system_error(errno.EISDIR)
    if not parent:
        return directory, name
    other = OpenDirectory(parent, below=directory)
    directory.close()
    return other, name


def _system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))  # of the subclass that fits


def _no_parent(error: OSError, given: str, parent: str) -> OSError:
    # torch says so whatever the reason.
    reason = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"
    return refused_target(error, given, f"Parent directory {parent} does not exist.{reason}")


def _check_parent_before_backslash(given: str) -> None:
    """torch looks at the text before the last backslash where there is no slash."""
    end = given.rfind("\\")
    if end <= 0:
        return
    try:
        if not stat.S_ISDIR(os.stat(given[:end]).st_mode):
            raise _system_error(errno.ENOTDIR)
    except OSError as e:
        raise _no_parent(e, given, given[:end]) from None
