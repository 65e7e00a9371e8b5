"""Reading an archive in pure Python over torch: see :class:`~statedict_io.backends.protocol.OpenArchive`.

Positional reads straight into the final storages. Reading and zlib release the GIL, so a few threads share the work.
"""

from __future__ import annotations

import ctypes
import functools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import torch

from ..archive import crc32
from ..archive.directory import Directory, read_directory
from ..archive.inflate import Damage, inflated
from ..archive.record_entry import RecordEntry
from ..errors import CorruptCheckpointError, corrupt
from ..progress import ProgressCallback
from ..system.descriptors import read_into
from .record_rows import Piece, pieces
from .tasks import Task, perform, task

if TYPE_CHECKING:
    from ..archive.payload_ranges import RangeDirectory, RangeEntries
    from ..archive.record_rows import RowsOfRecord

_PIECE_NBYTES = 8 << 20


class Access(NamedTuple):
    """What pays off with a kind of source."""

    num_threads: int
    small_nbytes: int  #: below this records are read together, with what lies between them, and copied
    run_nbytes: int  #: of what is read together
    checked_nbytes: int  #: read at once where it is checksummed
    waits: bool  #: a read is mostly waiting: also small ones are made side by side


#: what is checksummed is still in cache
DISK = Access(4, 64 << 10, 1 << 20, 1 << 20, False)
NETWORK = Access(8, 512 << 10, 8 << 20, _PIECE_NBYTES, True)

_T = TypeVar("_T")


class PositionalSource(Protocol):
    """Bytes by position: a file, or an object that is like one."""

    nbytes: int

    def read_into(self, destination: memoryview, offset: int) -> None:
        """Fills ``destination``; may be called from several threads at once.

        Raises:
            EOFError: the source has fewer bytes than it had.
        """


class FileSource:
    """The file behind a descriptor, which stays the caller's. System errors carry ``path``."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd, self._path = fd, path
        self.nbytes = os.fstat(fd).st_size

    def read_into(self, destination: memoryview, offset: int) -> None:
        try:
            while destination:
                taken = read_into(self._fd, destination, offset)
                if taken == 0:
                    raise EOFError
                destination = destination[taken:]
                offset += taken
        except OSError as e:
            e.filename = self._path
            raise


def storage_memory(storage: torch.UntypedStorage) -> memoryview:
    """The bytes of a CPU storage, writable; keeps the storage."""
    if storage.nbytes() == 0:
        return memoryview(bytearray())
    memory = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    memory._storage = storage  # the view's owner is this object, and now also of the memory
    return memoryview(memory).cast("B")


def new_storage(nbytes: int) -> torch.UntypedStorage:
    # A slice, because that cannot be resized.
    return torch.UntypedStorage(nbytes, device="cpu")[0:nbytes]


class PythonOpenArchive:
    """See :class:`~statedict_io.backends.protocol.OpenArchive`.

    Args:
        payloads: read these, of a file in another format; else what the directory of the archive says.
    """

    gathered_nbytes = 0

    def __init__(
        self, source: PositionalSource, path: str, access: Access = DISK, *, payloads: RangeEntries | None = None
    ) -> None:
        self._source = source
        self._access = access
        self._path = path
        self._directory: Directory | RangeDirectory
        if payloads is None:
            self._directory = self._guarded(lambda: read_directory(self._read_at, source.nbytes))
        else:
            from ..archive.payload_ranges import RangeDirectory

            self._directory = RangeDirectory(payloads)

    @property
    def archive_name(self) -> str:
        return self._directory.archive_name

    @property
    def records(self) -> Sequence[RecordEntry]:
        return self._directory.entries

    def payload_offset(self, record: int) -> int:
        header_nbytes = self._directory.header_nbytes(record)
        return self._guarded(
            lambda: self._directory.payload_offset(
                record, self._read_at(self.records[record].header_offset, header_nbytes)
            )
        )

    def read(self, record: int) -> bytes:
        entry = self.records[record]
        offset = self.payload_offset(record)
        if not entry.compressed:
            return self._guarded(lambda: self._read_at(offset, entry.nbytes))
        return b"".join(self._guarded(lambda: list(self._inflated(record, offset))))

    def read_range(self, record: int, offset: int, destination: memoryview, num_rows: int = 1, pitch: int = 0) -> None:
        parts = list(pieces(self.records[record], offset, destination, num_rows, pitch))
        start = self.payload_offset(record)

        def read(piece: Piece) -> None:
            row_nbytes = piece.destination.nbytes // piece.num_rows
            for row in range(piece.num_rows):
                into = piece.destination[row * row_nbytes : (row + 1) * row_nbytes]
                self._source.read_into(into, start + piece.offset + row * pitch)

        tasks = [task(0, read, piece) for piece in parts]
        self._guarded(lambda: self._perform([], tasks, destination.nbytes))

    def read_rows(self, wanted: Sequence[RowsOfRecord]) -> None:
        for rows in wanted:
            self.read_range(*rows)

    def load_storages(
        self, records: Sequence[int], *, verify: bool, progress: ProgressCallback | None
    ) -> list[torch.UntypedStorage]:
        storages: dict[int, torch.UntypedStorage] = {}

        def load_run(run: list[int]) -> None:
            for record, payload in self._read_run(run):
                storage = storages[record] = new_storage(len(payload))
                ctypes.memmove(storage.data_ptr(), payload, len(payload))
                if verify:
                    checks.add(record, zlib.crc32(payload), 0)

        def load_piece(record: int, offset: int, start: int, nbytes: int) -> None:
            memory = storage_memory(storages[record])[start : start + nbytes]
            step = self._access.checked_nbytes if verify else nbytes
            crc = 0
            for at in range(0, nbytes, step):
                self._source.read_into(memory[at : at + step], offset + at)
                if verify:
                    crc = zlib.crc32(memory[at : at + step], crc)
            if verify:
                checks.add(record, crc, self.records[record].nbytes - start - nbytes)

        def load_compressed(record: int, offset: int) -> None:
            storage = storages[record] = new_storage(self.records[record].nbytes)
            memory = storage_memory(storage)
            at = crc = 0
            for piece in self._inflated(record, offset):
                memory[at : at + len(piece)] = piece
                crc = zlib.crc32(piece, crc)
                at += len(piece)
            checks.add(record, crc, 0)

        checks = Checksums()
        self._guarded(
            lambda: self._for_all(
                set(records),
                progress,
                run=load_run,
                piece=load_piece,
                compressed=load_compressed,
                allocate=lambda record: storages.update({record: new_storage(self.records[record].nbytes)}),
            )
        )
        if verify:
            wrong = [record for record in storages if checks.of(record) != self.records[record].crc32]
            if wrong:
                raise self._checksum_error(wrong)
        return [storages[record] for record in records]

    def load_storages_onto(
        self, device: torch.device, records: Sequence[int], *, verify: bool, progress: ProgressCallback | None
    ) -> None:
        return None

    def checksums(self, records: Sequence[int], *, progress: ProgressCallback | None) -> list[int]:
        def check_run(run: list[int]) -> None:
            for record, payload in self._read_run(run):
                checks.add(record, zlib.crc32(payload), 0)

        def check_piece(record: int, offset: int, start: int, nbytes: int) -> None:
            buffer = memoryview(bytearray(min(nbytes, self._access.checked_nbytes)))
            crc = 0
            for at in range(0, nbytes, len(buffer)):
                part = buffer[: nbytes - at]
                self._source.read_into(part, offset + at)
                crc = zlib.crc32(part, crc)
            checks.add(record, crc, self.records[record].nbytes - start - nbytes)

        def check_compressed(record: int, offset: int) -> None:
            crc = 0
            for piece in self._inflated(record, offset):
                crc = zlib.crc32(piece, crc)
            checks.add(record, crc, 0)

        checks = Checksums()
        self._guarded(
            lambda: self._for_all(set(records), progress, run=check_run, piece=check_piece, compressed=check_compressed)
        )
        return [checks.of(record) for record in records]

    def _for_all(
        self,
        records: set[int],
        progress: ProgressCallback | None,
        *,
        run: Callable[[list[int]], None],
        piece: Callable[[int, int, int, int], None],
        compressed: Callable[[int, int], None],
        allocate: Callable[[int], None] = lambda record: None,
    ) -> None:
        """Goes through payloads in file order, in several threads.

        Args:
            run: takes small neighbours.
            piece: takes (record, offset in the file, offset in the payload, nbytes).
            compressed: takes (record, offset in the file).
            allocate: is called for a record before its pieces.
        """
        small, large = self._split(records)
        runs = [task(self._payload_nbytes(neighbours), run, neighbours) for neighbours in self._runs(small)]
        tasks = []
        for record, offset in zip(large, self._payload_offsets(large), strict=True):
            nbytes = self.records[record].nbytes
            if self.records[record].compressed:
                tasks.append(task(nbytes, compressed, record, offset))
                continue
            allocate(record)
            for start in range(0, nbytes, _PIECE_NBYTES):
                length = min(_PIECE_NBYTES, nbytes - start)
                tasks.append(task(length, piece, record, offset + start, start, length))
        # Runs are mostly Python's work: more threads would only wait for each other.
        self._perform(runs, tasks, self._payload_nbytes(records), progress)

    def _perform(
        self, alone: list[Task], together: list[Task], total: int, progress: ProgressCallback | None = None
    ) -> None:
        """``together``: those that are worth several threads where there is much to do."""
        if self._access.waits:
            alone, together = [], [*alone, *together]
            if len(together) == 1:
                alone, together = together, []
        elif total <= _PIECE_NBYTES:
            alone, together = [*alone, *together], []
        perform(alone, together, total, progress, self._access.num_threads)

    def _payload_nbytes(self, records: Iterable[int]) -> int:
        return sum(self.records[record].nbytes for record in records)

    def _payload_offsets(self, records: list[int]) -> list[int]:
        offsets: dict[int, int] = {}

        def find(record: int) -> None:
            offsets[record] = self.payload_offset(record)

        self._perform([task(0, find, record) for record in records], [], 0)
        return [offsets[record] for record in records]

    def _split(self, records: Iterable[int]) -> tuple[list[int], list[int]]:
        """Small and large ones, each in file order."""
        small: list[int] = []
        large: list[int] = []
        for record in sorted(records, key=lambda r: (self.records[r].header_offset, self.records[r].nbytes)):
            entry = self.records[record]
            span = self._directory.limit_offset(record) - entry.header_offset
            (large if entry.compressed or span > 2 * self._access.small_nbytes else small).append(record)
        return small, large

    def _runs(self, small: list[int]) -> Iterator[list[int]]:
        """Neighbours, up to ``run_nbytes`` from the first header to the end of the last record."""
        run: list[int] = []
        for record in small:
            if run and (
                self._directory.limit_offset(record) - self.records[run[0]].header_offset > self._access.run_nbytes
                or self.records[record].header_offset - self._directory.limit_offset(run[-1])
                > self._access.small_nbytes
            ):
                yield run
                run = []
            run.append(record)
        if run:
            yield run

    def _read_run(self, run: list[int]) -> Iterator[tuple[int, bytes]]:
        """(record, payload) of neighbours, which are read together."""
        start = self.records[run[0]].header_offset
        data = self._read_at(start, self._directory.limit_offset(run[-1]) - start)
        for record in run:
            entry = self.records[record]
            header_at = entry.header_offset - start
            header = data[header_at : header_at + self._directory.header_nbytes(record)]
            payload_at = self._directory.payload_offset(record, header) - start
            yield record, data[payload_at : payload_at + entry.nbytes]

    def _inflated(self, record: int, offset: int) -> Iterator[bytes]:
        return inflated(lambda at, nbytes: self._read_at(offset + at, nbytes), self.records[record])

    def _read_at(self, offset: int, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        self._source.read_into(memoryview(data), offset)
        return bytes(data)

    def _guarded(self, action: Callable[[], _T]) -> _T:
        try:
            return action()
        except Damage as e:
            raise corrupt(self._path, str(e)) from None
        except EOFError:
            raise corrupt(self._path, "the file became shorter while it was read") from None

    def _checksum_error(self, records: list[int]) -> CorruptCheckpointError:
        names = [self.records[record].name for record in sorted(records)]
        return corrupt(self._path, f"checksums do not match in {', '.join(names)}", names)


class Checksums:
    """CRCs of payloads from those of their pieces, in any order."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int]] = []

    def add(self, record: int, crc: int, nbytes_after: int) -> None:
        """From any thread."""
        self._pieces.append((record, crc32.shift(crc, nbytes_after)))

    def forget(self, records: Iterable[int]) -> None:
        """Before :meth:`of` is called."""
        forgotten = set(records)
        self._pieces = [piece for piece in self._pieces if piece[0] not in forgotten]

    def of(self, record: int) -> int:
        return self._by_record.get(record, 0)

    @functools.cached_property
    def _by_record(self) -> dict[int, int]:
        crcs: dict[int, int] = {}
        for record, crc in self._pieces:
            crcs[record] = crcs.get(record, 0) ^ crc
        return crcs
