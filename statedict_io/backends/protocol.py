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


class Archive(Protocol):
    """A planned archive. Nothing has been written; all sizes are known."""

    @property
    def nbytes(self) -> int:
        """Of the whole file."""

    def write_fd(
        self, fd: int, *, durable: bool, progress: ProgressCallback | None, bytes_per_second: float | None = None
    ) -> None:
        """Writes the archive into an empty file.

        ``durable`` says that an fsync will follow, which decides between direct and buffered writes; it is the caller
        who makes it.
        """

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        """Hands the archive to ``write`` from front to back. ``write`` must take all of what it is given."""

    @property
    def device_nbytes(self) -> dict[str, int]:
        """Of the storages on each device that a snapshot could leave there."""

    def snapshot_nbytes(self, *, on_devices: bool) -> int:
        """Of host memory that :meth:`snapshot` takes."""

    def snapshot(self, *, on_devices: bool, max_nbytes: int) -> Snapshot | None:
        """Copies the storages, which then are no longer referred to; of this archive nothing else may be used.

        Args:
            on_devices: copy storages on devices there. None is returned where a device has no room, and nothing has
                changed.
            max_nbytes: of host memory, that all snapshots and what is kept for the next may take.
        """


class Snapshot(Protocol):
    """An archive whose bytes are its own. It is written once, by any thread, and then released."""

    @property
    def nbytes(self) -> int:
        """Of the whole file."""

    def done(self) -> bool:
        """Whether every byte has been copied."""

    def wait(self) -> None:
        """Returns when it has."""

    def release(self) -> None:
        """Gives the memory back, for the next snapshot to use."""

    def write_fd(
        self, fd: int, *, durable: bool, progress: ProgressCallback | None, bytes_per_second: float | None = None
    ) -> None:
        """See :class:`Archive`."""

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        """See :class:`Archive`."""


class Backend(Protocol):
    name: str

    def native_table(self) -> NativeTable | None:
        """For :func:`~statedict_io.pickling.pickle_object`."""

    def plan(self, archive_name: str, contents: Contents, *, alignment: int, compute_crc32: bool) -> Archive: ...

    def release_buffers(self) -> None:
        """Gives idle memory back to the system."""
