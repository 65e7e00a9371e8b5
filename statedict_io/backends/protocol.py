"""What a backend is: a module with ``name`` and ``plan``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..pickling import NativeTable, StorageTable
from ..progress import ProgressCallback


@dataclass(frozen=True)
class Contents:
    """The records of an archive, in file order, without the serialization id: ``head``, ``data/0``, ``data/1``, ...,
    ``tail``."""

    head: list[tuple[str, bytes]]
    table: StorageTable
    tail: list[tuple[str, bytes]]
    skip_data: bool  #: leave holes of the storages' sizes


class Content(Protocol):
    """The bytes of a file, to be put somewhere."""

    def write_fd(self, fd: int, *, durable: bool, progress: ProgressCallback | None) -> None:
        """Writes them into an empty file.

        ``durable`` says that an fsync will follow, which decides between direct and buffered writes; it is the caller
        who makes it.
        """

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        """Hands them to ``write`` from front to back. ``write`` must take all of what it is given."""


class Archive(Content, Protocol):
    """A planned archive. Nothing has been written; all sizes are known."""

    @property
    def nbytes(self) -> int:
        """Of the whole file."""


class Backend(Protocol):
    name: str

    def native_table(self) -> NativeTable | None:
        """For :func:`~statedict_io.pickling.pickle_object`."""

    def plan(self, archive_name: str, contents: Contents, *, alignment: int, compute_crc32: bool) -> Archive: ...
