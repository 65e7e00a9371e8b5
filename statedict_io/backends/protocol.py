"""What a backend is, what goes into it, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from ..pickles.pickling import NativeTables, StorageTable
from ..progress import ProgressCallback
from ..system.file_digest import FileDigest

if TYPE_CHECKING:  # what only reading needs is imported when something is read
    from ..archive.payload_ranges import RangeEntries
    from ..archive.record_entry import RecordEntry
    from ..archive.record_rows import RowsOfRecord
    from ..pickles.lean_pickle import LeanPickle


@dataclass(slots=True)  # as targets.FileTarget
class Records:
    """The records of an archive, in file order, without the serialization id: ``head``, ``data/0``, ``data/1``, ...,
    ``tail``."""

    head: list[tuple[str, bytes]]
    table: StorageTable
    tail: list[tuple[str, bytes]]
    skip_data: bool  #: leave holes of the storages' sizes


class Content(Protocol):
    """The bytes of a file, to be put somewhere. Again, where the first time has failed."""

    in_any_order: bool  #: whether :meth:`write_fd` writes otherwise than from front to back

    @property
    def nbytes(self) -> int | None:
        """Of the whole file; None where that is known when the last byte is."""

    def write_fd(
        self,
        fd: int,
        *,
        durable: bool,
        progress: ProgressCallback | None,
        bytes_per_second: float | None = None,
        digest: FileDigest | None = None,
    ) -> None:
        """Writes them into an empty file.

        Args:
            durable: an fsync will follow, which decides between direct and buffered writes; it is the caller who makes
                it.
            bytes_per_second: not more than; None: as fast as it goes.
            digest: is given their hash, or what it hashes.
        """

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        """Hands them to ``write`` from front to back. ``write`` must take all of what it is given."""


class StorageRange(NamedTuple):
    """Bytes of a storage, on any device, as a part of a file."""

    name: str  #: of what they are, for messages: "tensor 'weight'"
    storage: torch.UntypedStorage
    offset: int  #: of the first, in the storage
    nbytes: int


class PlannedFile(Content, Protocol):
    """A planned file. Nothing has been written; all sizes are known."""

    @property
    def nbytes(self) -> int:
        """Of the whole file."""

    @property
    def device_nbytes(self) -> dict[str, int]:
        """Of the storages on each device that a snapshot could leave there."""

    def snapshot_nbytes(self, *, on_devices: bool) -> int:
        """Of host memory that :meth:`snapshot` takes."""

    def snapshot(self, *, on_devices: bool, max_nbytes: int) -> Snapshot | None:
        """Copies the storages, which then are no longer referred to; of this file nothing else may be used.

        Args:
            on_devices: copy storages on devices there. None is returned where a device has no room, and nothing has
                changed.
            max_nbytes: of host memory, that all snapshots and what is kept for the next may take.
        """


class Snapshot(Content, Protocol):
    """A file whose bytes are its own. It is written by any thread, and then released."""

    @property
    def nbytes(self) -> int:
        """Of the whole file."""

    def done(self) -> bool:
        """Whether every byte has been copied."""

    def wait(self) -> None:
        """Returns when it has."""

    def release(self) -> None:
        """Gives the memory back, for the next snapshot to use."""


class Strip(NamedTuple):
    """Rows of bytes, gapless in memory and at one pitch in a file: a part of one record that one process writes."""

    source: int  #: index of the storage
    source_offset: int  #: of the first byte, in the storage
    file_offset: int  #: of the first byte, in the file
    row_nbytes: int
    num_rows: int
    file_pitch: int  #: from row to row in the file
    nbytes_after: int  #: of the record, behind the last row


class OpenArchive(Protocol):
    """An open archive, or payloads of a file in another format: each a record, not compressed and without a checksum.

    The descriptor is the caller's, stays open, and is only read positionally. :meth:`read_range` and
    :meth:`load_storages` may be called from several threads at once, the other methods from one at a time. A structure
    that cannot be a sound archive raises :class:`~statedict_io.CorruptCheckpointError`; what the system reports is an
    :class:`OSError` with ``errno`` and the path.
    """

    @property
    def archive_name(self) -> str:
        """The folder of the first record, "" if it is in none."""

    @property
    def records(self) -> Sequence[RecordEntry]:
        """In the order of the directory."""

    def payload_offset(self, record: int) -> int:
        """In the file; reads the local header and checks it against the directory."""

    def read(self, record: int) -> bytes:
        """The whole payload, decompressed, its CRC not checked: for small records."""

    def read_range(self, record: int, offset: int, destination: memoryview, num_rows: int = 1, pitch: int = 0) -> None:
        """Fills ``destination`` from the payload's byte ``offset`` on, of records that are not compressed; large ranges
        from several threads.

        Args:
            num_rows: so many rows of one length are read, one after the other into ``destination``.
            pitch: bytes from the start of one to the start of the next.

        Raises:
            ValueError: the record has no such bytes, or is compressed.
        """

    @property
    def gathered_nbytes(self) -> int:
        """So much is worth being asked of :meth:`read_rows` at once; 0: one after the other is as fast."""

    def read_rows(self, wanted: Sequence[RowsOfRecord]) -> None:
        """As :meth:`read_range`, all of them."""

    def load_storages(
        self, records: Sequence[int], *, verify: bool, progress: ProgressCallback | None
    ) -> list[torch.UntypedStorage]:
        """CPU storages with the payloads. Like those of ``torch.load`` they cannot be resized: a tensor that claims
        more than its storage is refused.

        ``verify`` checks each CRC while reading and raises CorruptCheckpointError with the ``records`` that failed.
        """

    def load_storages_onto(
        self, device: torch.device, records: Sequence[int], *, verify: bool, progress: ProgressCallback | None
    ) -> list[torch.UntypedStorage] | None:
        """The same on a device, with host memory for what is under way only; every byte is there on return.

        None, with nothing read, where this reader or that device cannot: then it is for torch to move them.
        """

    def checksums(self, records: Sequence[int], *, progress: ProgressCallback | None) -> list[int]:
        """The CRC-32 of each payload as it is in the file, in bounded memory."""


class Backend(Protocol):
    name: str

    def native_tables(self) -> NativeTables | None:
        """For :func:`~statedict_io.pickles.pickling.pickle_object`."""

    def plan(self, archive_name: str, records: Records, *, alignment: int, compute_crc32: bool) -> PlannedFile:
        """An archive of ``torch.save``."""

    def plan_gapless(self, parts: Sequence[bytes | StorageRange]) -> PlannedFile:
        """A file of ``parts``, one behind the other and with nothing between them.

        Raises:
            ValueError: a storage has no such bytes.
        """

    def write_strips(
        self,
        path: str,
        storages: Sequence[torch.UntypedStorage],
        strips: Sequence[Strip],
        *,
        durable: bool,
        compute_crc32: bool,
        progress: ProgressCallback | None,
    ) -> list[tuple[int, bytes]]:
        """Writes into an existing file, of which other processes write other bytes at the same time.

        Args:
            path: of the file; neither created nor cut.
            storages: on any device.
            strips: in any order, without overlap.
            durable: flush to the device before returning.
            compute_crc32: False returns zeros for CRCs.

        Returns:
            For each strip, what it adds to the CRC of its record (their XOR over all strips of a record is its CRC-32),
            and its first bytes, at most eight.

        Raises:
            OSError: with ``errno`` and ``path``.
        """

    def open_archive(self, fd: int, path: str) -> OpenArchive:
        """Reads the central directory of the file behind ``fd``; ``path`` is for messages."""

    def open_payloads(self, fd: int, path: str, payloads: RangeEntries) -> OpenArchive:
        """Reads payloads at known places of a file in another format; they lie within it and do not overlap."""

    def lean_pickle(self, data_pkl: bytes) -> LeanPickle:
        """A stream that does the same with fewer steps, for an unpickler that takes long over each."""

    def release_buffers(self) -> None:
        """Gives idle memory back to the system."""

    def snapshot_memory_nbytes(self) -> int:
        """Host memory of snapshots, in use or idle."""
