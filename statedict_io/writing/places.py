"""How a file can be written where it is to be: replaced or in place, in any order or from front to back. What a place
has refused once it is not asked for again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from ..backends.protocol import Content
from ..progress import ProgressCallback
from ..system.descriptors import NOT_IMPLEMENTED, write_all
from ..system.directories import OpenDirectory
from ..system.file_digest import FileDigest
from ..system.pacing import paced
from .in_place import InPlace
from .replacement import Replacement
from .stock_saves import StockZip
from .targets import FileTarget

OpenFile = Replacement | InPlace

# The answers of mounts that take bytes only behind those they have, or cannot cut a file to its length.
_IN_ORDER_ONLY = {errno.EINVAL, errno.ESPIPE, *NOT_IMPLEMENTED}

# File systems, directories or files, each with where it was: numbers of what is gone are given out again.
_in_order_only: set[tuple[int, str]] = set()
_cannot_rename: set[tuple[int | str, str]] = set()


def write_file(
    target: FileTarget,
    write: Callable[[OpenFile], None],
    *,
    durable: bool,
    atomic: bool | None,
    is_superseded: Callable[[], bool] = lambda: False,
    for_torch: bool = False,
    before: Callable[[], None] = lambda: None,
) -> OSError | None:
    """Opens ``target``, has ``write`` write it and commits it, unless ``is_superseded``.

    Args:
        write: may be called twice.
        durable, for_torch: as of :class:`~statedict_io.writing.replacement.Replacement`.
        atomic: whether to replace the file; None: where it can be replaced, else in place.
        before: called when the old file is about to go.

    Returns:
        Why the file was written in place although it was to be replaced; None where that was not so.

    Raises:
        OSError: what the system reported, with the path as it was given.
        StateDictIOError: as of :class:`~statedict_io.writing.in_place.InPlace`.
    """
    refusal: OSError | None = None
    if atomic is None and _is_known(target):
        refusal = OSError(errno.EPERM, "as was found before", target.given)
    elif atomic is not False:
        replacement = Replacement(target, durable=durable, for_torch=for_torch)
        try:
            try:
                with replacement:
                    write(replacement)
                    replacement.commit(is_superseded, before)
            finally:
                replacement.abandon()  # a signal's exception can come up on the way into the block's end
            return None
        except OSError as e:
            if atomic or not replacement.is_refused:
                raise
            if replacement.was_refused_at_the_end:
                _cannot_rename.add(_place_of(target, e.errno))
            refusal = OSError(e.errno, os.strerror(e.errno or 0), target.given)
    if is_superseded():
        return refusal
    before()
    file = InPlace(target, durable=durable)
    try:
        with file:
            write(file)
            file.commit()
    finally:
        file.abandon()
    return refusal


def write_content(
    content: Content,
    file: OpenFile,
    *,
    durable: bool,
    progress: ProgressCallback | None,
    bytes_per_second: float | None = None,
    digest: FileDigest | None = None,
) -> None:
    """Writes ``content`` into an empty file: in any order, which is fastest, or from front to back where nothing
    else is taken.

    Args:
        durable: an fsync will follow.
        bytes_per_second: not more than; None: no limit.
        digest: that is wanted.
    """
    if digest is not None:
        digest.begin()
    if isinstance(content, StockZip):
        content.write_open_file(file.fd, file.paths_for_torch)
        if digest is not None:
            _read_again(file, digest)
        return

    def write_in_order() -> None:
        write = paced(lambda data: write_all(file.fd, data), bytes_per_second)
        content.write_stream(write if digest is None else digest.teed(write), progress=progress)

    if content.in_any_order and _in_order_only and _file_system_of(file) in _in_order_only:
        write_in_order()
        return
    try:
        content.write_fd(file.fd, durable=durable, progress=progress, bytes_per_second=bytes_per_second, digest=digest)
    except OSError as e:
        if not (content.in_any_order and takes_bytes_in_order_only(e)):
            raise
        file.start_again()
        if digest is not None:
            digest.begin()
        write_in_order()
        _in_order_only.add(_file_system_of(file))


def _read_again(file: OpenFile, digest: FileDigest) -> None:
    """Of what torch wrote by itself, and not from front to back."""
    fd = file.open_to_read()
    try:
        digest.update_from(fd)
    finally:
        os.close(fd)


def takes_bytes_in_order_only(error: OSError) -> bool:
    """Whether a positional write that ended in ``error`` was one to a mount that takes bytes from front to back only,
    as far as an answer tells."""
    return error.errno in _IN_ORDER_ONLY


def _file_system_of(file: OpenFile) -> tuple[int, str]:
    return os.fstat(file.fd).st_dev, _mount_point_of(file.target.directory)


def _mount_point_of(directory: OpenDirectory) -> str:
    path = directory.location
    while path != (parent := os.path.dirname(path)) and not os.path.ismount(path):
        path = parent
    return path


def _is_known(target: FileTarget) -> bool:
    if not _cannot_rename:
        return False
    directory = target.directory
    return not _cannot_rename.isdisjoint(
        [
            (directory.facts.st_dev, _mount_point_of(directory)),
            (directory.identity, directory.location),
            (target.identity, directory.location),
        ]
    )


def _place_of(target: FileTarget, error_number: int | None) -> tuple[int | str, str]:
    """What else shares the reason: the file system, the directory, or nothing but the file."""
    if error_number in NOT_IMPLEMENTED:
        return target.directory.facts.st_dev, _mount_point_of(target.directory)
    if error_number in (errno.EBUSY, errno.ENAMETOOLONG) or os.name == "nt":  # where whoever has it open is the reason
        return target.identity, target.directory.location
    return target.directory.identity, target.directory.location
