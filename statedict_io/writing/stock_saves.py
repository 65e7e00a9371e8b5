"""What the installed ``torch.save`` writes, as a content: the legacy format, and every zip on a torch whose format ours
does not reproduce. So a new torch can make saves slow, never wrong.

torch pickles while it writes, and names a zip after the path that it opens. So it opens the file that is being written
itself, by a path of the right name. Where there is none, as for an upload, it writes a private file first, whose bytes
are copied.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import StateDictIOError
from ..installed.stock import torch_save
from ..progress import ProgressCallback
from ..system.descriptors import NONBLOCK, open_file, write_all
from ..system.directories import OpenDirectory
from ..system.file_digest import FileDigest
from ..system.pacing import paced
from .targets import archive_name_of

_PIECE_NBYTES = 1 << 20


class StockContent:
    """A :class:`~statedict_io.backends.protocol.Content`. Nothing has been pickled: what torch refuses it refuses when
    it is written. Nor is there any progress to report, because the size is known when the last byte is.

    Args:
        obj: to be saved.
        torch_options: of ``torch.save``.
    """

    in_any_order = False
    nbytes = None

    def __init__(self, obj: Any, **torch_options: Any) -> None:
        self._obj = obj
        self._options = torch_options

    def write_fd(
        self,
        fd: int,
        *,
        durable: bool,
        progress: ProgressCallback | None,
        bytes_per_second: float | None = None,
        digest: FileDigest | None = None,
    ) -> None:
        del durable  # the commit's affair
        write = paced(lambda data: write_all(fd, data), bytes_per_second)
        self.write_stream(write if digest is None else digest.teed(write), progress=progress)

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        raise NotImplementedError


class StockLegacy(StockContent):
    """The format before torch 1.6."""

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        del progress
        torch_save(self._obj, _Stream(write), **self._options, _use_new_zipfile_serialization=False)


class StockZip(StockContent):
    """The format since.

    Args:
        obj, torch_options: as of :class:`StockContent`.
        archive_name: that torch is to take from the path; "archive" for a stream.
        stream: what :meth:`write_stream` will write to, where that is the caller's object: torch makes holes in it, for
            ``torch.serialization.skip_data``, by its ``seek``.
    """

    def __init__(self, obj: Any, archive_name: str, *, stream: Any = None, **torch_options: Any) -> None:
        super().__init__(obj, **torch_options)
        self._archive_name = archive_name
        self._stream = stream

    def write_open_file(self, fd: int, paths: Sequence[str]) -> None:
        """Writes into an empty file, or from front to back into a pipe.

        Args:
            fd: the file.
            paths: that may lead to it. torch opens the first that does and has the right name; if there is none the
                file is written from a private one.
        """
        for path in paths:
            if archive_name_of(path) == self._archive_name and _opens(path, fd):
                torch_save(self._obj, path, **self._options)
                return
        self.write_fd(fd, durable=False, progress=None)

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        del progress
        if self._stream is not None:
            torch_save(self._obj, _Stream(write, getattr(self._stream, "seek", None)), **self._options)
            return
        name = self._archive_name
        with _private_path(f"{name}.x" if "." in name else name) as path:  # torch drops the last suffix
            torch_save(self._obj, path, **self._options)
            with open(path, "rb", buffering=0) as file:
                while piece := file.read(_PIECE_NBYTES):
                    write(memoryview(piece))


def _opens(path: str, fd: int) -> bool:
    """Whether opening ``path`` for writing opens the file of ``fd``: some mounts refuse a second writer."""
    try:
        other = open_file(path, os.O_WRONLY | NONBLOCK)
        try:
            return os.path.samestat(os.fstat(other), os.fstat(fd))
        finally:
            os.close(other)
    except OSError:
        return False


@contextlib.contextmanager
def _private_path(name: str) -> Iterator[str]:
    """A path that ends in ``name``, of no file yet, in a temporary directory that nobody else may enter.

    Raises:
        OSError: what the system reported, without a path.
    """
    made, directory = "", None
    try:
        try:
            made = tempfile.mkdtemp(prefix="statedict_io-")
            directory = OpenDirectory(made)
        except OSError as e:
            where = "torch.save needs a temporary directory (environment variable TMPDIR) to name this archive"
            raise OSError(e.errno, f"{e.strerror}: {where}") from None
        path = directory.path_of(name)
        if not path.isascii():  # it would be named "archive"
            raise StateDictIOError(
                f"{path}: torch.save takes no name from a path that is not ASCII; set TMPDIR to another directory"
            )
        try:
            yield path
        except OSError as e:
            if e.filename == path:
                del e.filename
            raise
    finally:
        for remove, what in ((os.unlink, os.path.join(made, name)), (os.rmdir, made)):
            with contextlib.suppress(OSError):
                if made:
                    remove(what)
        if directory is not None:
            directory.close()


class _Stream:
    """A file without a descriptor: past one that has it torch writes storages from C++, and errors lose their errno."""

    def __init__(self, write: Callable[[memoryview], Any], seek: Callable[..., Any] | None = None) -> None:
        self._write = write
        if seek is not None:  # torch looks whether there is one
            self.seek = seek

    def write(self, data: bytes | memoryview) -> int:
        self._write(memoryview(data))
        return len(data)

    def flush(self) -> None:
        """Nothing is held back here."""
