"""An object of any store that fsspec knows, written from front to back: one part after another, by one connection.

Memory is a few parts, whatever the size. Used by one thread.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ..system.full_writes import full_writer
from .stores import Place, naming_errors, note_discard_failed

_MIB = 1 << 20
#: S3 takes from 5 MiB to 5 GiB a part and 10,000 parts; Google takes multiples of 256 KiB.
_LEAST_PART_NBYTES = 16 * _MIB
_PART_NBYTES_OF_UNKNOWN_SIZE = 64 * _MIB
_MAX_NUM_PARTS = 9000
_PIECE_NBYTES = 1 * _MIB
#: Stores whose objects appear when their file is closed, and have no other way to commit.
_COMMIT_BY_CLOSING = {"abfs", "abfss", "az"}


class FrontToBackUpload:
    """See :class:`~statedict_io.remote.uploads.Upload`; made by ``open_upload``."""

    def __init__(self, place: Place, nbytes: int | None, report: Callable[[int], object] = lambda nbytes: None) -> None:
        self._place = place
        self._report = report
        self._part_nbytes = part_nbytes(nbytes)
        self._nbytes_written = 0
        self._temporary: str | None = None
        with naming_errors(place.url):
            self._file: Any = self._open()
        self._write = full_writer(self._file)

    def write(self, data: memoryview) -> None:
        wants_bytes = not _is_buffered(self._file)
        data = memoryview(data).cast("B")
        with naming_errors(self._place.url):
            while data:
                # Parts of one size each: some stores insist, and no more than one is held.
                room = self._part_nbytes - self._nbytes_written % self._part_nbytes
                piece = data[: min(room, _PIECE_NBYTES)]
                self._write(bytes(piece) if wants_bytes else piece)
                self._nbytes_written += len(piece)
                data = data[len(piece) :]
        self._report(self._nbytes_written)

    def flush(self) -> None:
        pass

    def commit(self) -> None:
        with naming_errors(self._place.url):
            self._file.close()
            if self._temporary is not None:
                self._place.fs.mv(self._temporary, self._place.path)
            elif not _commits_by_closing(self._place.fs, self._file):
                self._file.commit()
        self._file = None

    def __enter__(self) -> FrontToBackUpload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        try:
            self._discard()
        except Exception as e:
            note_discard_failed(error, e, self._place.url)

    def _open(self) -> Any:
        """Of the target where nothing appears before the commit, else of a temporary name beside it.

        Which it is only an opened file tells, so the temporary name is opened first. In most stores that asks nothing
        of the server.
        """
        path = self._place.path
        folder, name = path[: path.rfind("/") + 1], self._place.file_name
        temporary = f"{folder}.{name[:100]}.{secrets.token_hex(8)}.sdio-tmp"
        file = self._open_at(temporary)
        if not (_commits_by_closing(self._place.fs, file) or _holds_back(self._place.fs, file, temporary)):
            self._temporary = temporary
            return file
        with contextlib.suppress(Exception):  # nothing was written, and some stores miss it
            _discard(file)
        return self._open_at(path)

    def _open_at(self, path: str) -> Any:
        fs = self._place.fs
        file = fs.open(path, "wb", block_size=self._part_nbytes, autocommit=False)
        # fsspec notes the file for the transaction that it thinks we are in, whose end would commit it.
        with contextlib.suppress(AttributeError, ValueError):
            fs.transaction.files.remove(file)
        return file

    def _discard(self) -> None:
        file, self._file = self._file, None
        if self._temporary is None:
            _discard(file)
            return
        with contextlib.suppress(Exception):
            file.close()
        with contextlib.suppress(FileNotFoundError):
            self._place.fs.rm_file(self._temporary)


def part_nbytes(nbytes: int | None) -> int:
    """Of the parts of an object of ``nbytes``: two or three of them are held in memory."""
    if nbytes is None:
        return _PART_NBYTES_OF_UNKNOWN_SIZE
    return max(_LEAST_PART_NBYTES, -(-nbytes // _MAX_NUM_PARTS // _MIB) * _MIB)


def _is_buffered(file: Any) -> bool:
    from fsspec.spec import AbstractBufferedFile

    return isinstance(file, AbstractBufferedFile)


def _holds_back(fs: Any, file: Any, path: str) -> bool:
    """Whether ``file`` understood ``autocommit=False``: most take the word, and some of them ignore it."""
    from fsspec.spec import AbstractBufferedFile

    if "commit" in getattr(file, "__dict__", {}):  # sftp adds it to a file of paramiko's
        return True
    if getattr(type(file), "commit", AbstractBufferedFile.commit) is AbstractBufferedFile.commit:
        return False
    if hasattr(file, "autocommit"):
        return not file.autocommit
    return not fs.exists(path)  # smb understands and does not say so, memory neither


def _commits_by_closing(fs: Any, file: Any) -> bool:
    from fsspec.implementations.cached import LocalTempFile

    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return (isinstance(file, LocalTempFile) and file.autocommit) or bool(protocols & _COMMIT_BY_CLOSING)


def _discard(file: Any) -> None:
    """For good: what fsspec has buffered it would otherwise upload when the file is garbage collected."""
    try:
        file.discard()
    finally:
        with contextlib.suppress(Exception):
            file.closed = True
