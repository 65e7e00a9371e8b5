"""Whether a checkpoint is sound: its digest and its CRCs, these alone, or its structure."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from typing import Literal

from ..errors import CorruptCheckpointError, FileKindError
from . import facts
from .facts import read_facts
from .folder import Folder, Listed
from .leases import Lease

Level = Literal["digest", "crc", "structure", False]
Verify = Literal["digest", "crc", "structure"] | bool
_MAX_PROBLEMS_SHOWN = 3

# What the system says of what is no file, and of a file that cannot be read. Anything else, such as want of descriptors
# or a store that does not answer, says nothing about the checkpoint: passing it over would silently resume from an
# older one.
_NO_FILE_TO_READ = {errno.EISDIR, errno.ENXIO, errno.ENODEV, errno.ELOOP, errno.ENOTDIR, errno.EINVAL}
_UNREADABLE = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EIO", "ENODATA", "EBADMSG", "EUCLEAN", "EOVERFLOW")
    if hasattr(errno, name)
}
_STALE = getattr(errno, "ESTALE", errno.ENOENT)


class Unsound(Exception):
    """The checkpoint cannot be used; ``str()`` of it is a line for people, which names the path.

    Attributes:
        error: why it cannot be read, where that need not be its own fault: a disk, a mount, rights.
    """

    def __init__(self, reason: str, error: OSError | None = None) -> None:
        super().__init__(reason)
        self.error = error


class Vanished(Exception):
    """It was there when the folder was listed: another process has deleted it since, or its server has lost it.

    Attributes:
        error: what the system said.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def checked_level(verify: object) -> Level:
    """
    Raises:
        ValueError: ``verify`` is none.
    """
    if verify is True:
        return "crc"
    if verify == "digest" or verify == "crc" or verify == "structure" or verify is False:
        return verify
    raise ValueError(f"verify must be 'digest', 'crc', 'structure' or False, got {verify!r}")


def check(folder: Folder, listed: Listed, level: Level, *, backend: str = "auto") -> None:
    """
    Raises:
        Unsound, Vanished: it is not what this level asks for.
        OSError: something that is not the checkpoint's fault.
    """
    if listed.kind == "other":
        raise Unsound(f"{folder.shown(listed.name)}: is not a regular file")
    if level is not False:
        path = folder.path_of(listed.name)
        with judged(folder, listed), Lease(folder, listed.name):
            if folder.is_local:
                _check_file(path)
            _check_structure(path, backend)
            if level != "structure":
                _check_checksums(path, backend)
            if level == "digest":
                check_digest(folder, listed.name)


@contextlib.contextmanager
def judged(folder: Folder, listed: Listed) -> Iterator[None]:
    """Around what reads a checkpoint: errors that are the checkpoint's fault become :class:`Unsound` or
    :class:`Vanished`."""
    shown = folder.shown(listed.name)
    try:
        yield
    except (CorruptCheckpointError, FileKindError) as e:
        raise Unsound(str(e)) from e
    except OSError as e:
        if e.errno in _NO_FILE_TO_READ or e.errno in _UNREADABLE:
            is_its_own = e.errno in _NO_FILE_TO_READ and folder.is_local and _is_no_file(shown)
            raise Unsound(f"{shown}: {e.strerror or e}", None if is_its_own else e) from e
        if e.errno not in (errno.ENOENT, _STALE):
            raise
        if e.errno == errno.ENOENT and folder.is_local and os.path.islink(shown):
            raise Unsound(f"{shown}: is a link that leads nowhere") from e
        raise Vanished(e) from e


def check_digest(folder: Folder, name: str) -> None:
    """Where one is noted.

    Raises:
        Unsound, OSError: as :func:`check`.
    """
    while True:
        version = folder.version(name)
        noted = read_facts(folder, name).sha256
        if noted is None or (found := digest_of(folder, name)) == noted:
            return
        if folder.version(name) == version:  # or else it has been saved again meanwhile
            raise Unsound(
                f"{folder.shown(name)}: these are not the bytes that were saved: their sha256 is {found}, "
                f"{name}{facts.SUFFIX} has {noted}"
            )


def digest_of(folder: Folder, name: str) -> str:
    """The sha256 of the file's bytes, in hex.

    Raises:
        OSError: it cannot be read.
    """
    total = hashlib.sha256()
    for piece in folder.pieces(name):
        total.update(piece)
    return total.hexdigest()


def _is_no_file(path: str) -> bool:
    """Whether it is known to be something else, such as a directory or a link."""
    try:
        return not stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _check_file(path: str) -> None:
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise Unsound(f"{path}: is not a regular file")
    if facts.st_size == 0:
        raise Unsound(f"{path}: is empty")


def _check_checksums(path: str, backend: str) -> None:
    from ..reading.verification import verify

    problems = verify(path, backend=backend).problems
    if problems:
        more = f"; and {len(problems) - _MAX_PROBLEMS_SHOWN} more" if len(problems) > _MAX_PROBLEMS_SHOWN else ""
        raise Unsound("; ".join(problems[:_MAX_PROBLEMS_SHOWN]) + more)


def _check_structure(path: str, backend: str) -> None:
    """The directory of the archive, which is at the end of a whole file, and the records that are not tensors."""
    from ..reading.records import check_kind, open_records
    from ..reading.verification import check

    with open_records(path, backend) as records:
        check_kind(records)
        check(records, records.others())
