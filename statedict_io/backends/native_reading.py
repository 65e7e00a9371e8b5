"""Reading through the extension: see :class:`~statedict_io.backends.protocol.OpenArchive`.

The extension reads stored records and says what is wrong with a structure; paths, and the rare compressed record, are
added here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from ..archive.inflate import Damage, inflated
from ..archive.record_entry import RecordEntry
from ..errors import corrupt, naming
from ..progress import ProgressCallback
from .record_rows import Piece, pieces
from .tasks import perform, task

if TYPE_CHECKING:
    from ..archive.payload_ranges import RangeEntries
    from ..archive.record_rows import RowsOfRecord

_NUM_THREADS = 4  # of a range that is read in pieces


class NativeOpenArchive:
    gathered_nbytes = 0

    def __init__(
        self,
        extension: ModuleType,
        fd: int,
        path: str,
        direct: str = "auto",
        *,
        payloads: RangeEntries | None = None,
    ) -> None:
        self._extension = extension
        self._path = path
        self._skips_empty = payloads is not None  #: payloads of no bytes, which have not even a header to be read
        self.records: Sequence[RecordEntry]
        self.archive_name: str = ""
        if payloads is not None:
            with self._naming_errors():
                self._reader = extension.OpenArchive(fd, direct=direct, payloads=payloads.ranges())
            self.records = payloads
            return
        with self._naming_errors():
            self._reader = extension.OpenArchive(fd, direct=direct)
        self.archive_name = self._reader.archive_name
        # In place: an archive may have a million records and nothing in them.
        entries = self._reader.entries()
        for record, entry in enumerate(entries):
            entries[record] = RecordEntry._make(entry)
        self.records = entries

    def payload_offset(self, record: int) -> int:
        with self._naming_errors():
            return self._reader.payload_offset(record)

    def read(self, record: int) -> bytes:
        entry = self.records[record]
        with self._naming_errors():
            if entry.compressed:
                return b"".join(self._inflated(record))
            return self._reader.read_stored(record, 0, entry.nbytes)

    def read_range(self, record: int, offset: int, destination: memoryview, num_rows: int = 1, pitch: int = 0) -> None:
        def read(piece: Piece) -> None:
            self._reader.read_into(record, piece.offset, piece.destination, piece.num_rows, pitch)

        tasks = [task(0, read, piece) for piece in pieces(self.records[record], offset, destination, num_rows, pitch)]
        with self._naming_errors():
            if len(tasks) > 1:
                perform([], tasks, 0, None, _NUM_THREADS)
            elif tasks:
                tasks[0]()

    def read_rows(self, wanted: Sequence[RowsOfRecord]) -> None:
        for rows in wanted:
            self.read_range(*rows)

    def load_storages(
        self, records: Sequence[int], *, verify: bool, progress: ProgressCallback | None
    ) -> list[torch.UntypedStorage]:
        loaded = self._load(None, records, verify, progress)
        assert loaded is not None
        return loaded

    def load_storages_onto(
        self, device: torch.device, records: Sequence[int], *, verify: bool, progress: ProgressCallback | None
    ) -> list[torch.UntypedStorage] | None:
        return self._load(device, records, verify, progress)

    def _load(
        self, device: torch.device | None, records: Sequence[int], verify: bool, progress: ProgressCallback | None
    ) -> list[torch.UntypedStorage] | None:
        stored, in_memory = self._split(records)
        report = _Report(progress, sum(self.records[record].nbytes for record in in_memory))
        with self._naming_errors():
            if device is None:
                found = self._reader.load_storages(stored, verify=verify, progress=report.of_stored)
            else:
                found = self._reader.load_storages_onto(str(device), stored, verify=verify, progress=report.of_stored)
            if found is None:
                return None
            storages, wrong = found
            loaded = dict(zip(stored, storages, strict=False))  # no storages where a checksum is wrong
            for record in in_memory:
                storage, crc = self._load_in_memory(record)
                loaded[record] = storage if device is None else storage.to(device=device)
                if verify and self.records[record].crc32 != crc:
                    wrong.append(record)
                report.add(self.records[record].nbytes)
        if wrong:
            names = [self.records[record].name for record in sorted(wrong)]
            raise corrupt(self._path, f"checksums do not match in {', '.join(names)}", names)
        return [loaded[record] for record in records]

    def checksums(self, records: Sequence[int], *, progress: ProgressCallback | None) -> list[int]:
        stored, in_memory = self._split(records)
        report = _Report(progress, sum(self.records[record].nbytes for record in in_memory))
        with self._naming_errors():
            crcs = dict(zip(stored, self._reader.checksums(stored, progress=report.of_stored), strict=True))
            for record in in_memory:
                crcs[record] = 0
                for piece in self._inflated(record):
                    crcs[record] = self._extension.crc32(piece, crcs[record])
                report.add(self.records[record].nbytes)
        return [crcs[record] for record in records]

    def _split(self, records: Sequence[int]) -> tuple[list[int], list[int]]:
        """Each once: those that the extension reads; those that pass through Python, which are compressed or empty."""
        parts: tuple[list[int], list[int]] = ([], [])
        for record in dict.fromkeys(records):
            entry = self.records[record]
            parts[entry.compressed or (self._skips_empty and entry.nbytes == 0)].append(record)
        return parts

    def _load_in_memory(self, record: int) -> tuple[torch.UntypedStorage, int]:
        nbytes = self.records[record].nbytes
        # A slice cannot be resized, like the storages of torch.load and of the extension.
        storage = torch.UntypedStorage(nbytes, device="cpu")[0:nbytes]
        done = crc = 0
        for piece in self._inflated(record):
            ctypes.memmove(storage.data_ptr() + done, piece, len(piece))
            crc = self._extension.crc32(piece, crc)
            done += len(piece)
        return storage, crc

    def _inflated(self, record: int) -> Iterator[bytes]:
        if not self.records[record].compressed:
            return iter(())
        return inflated(lambda offset, nbytes: self._reader.read_stored(record, offset, nbytes), self.records[record])

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            with naming(self._path):
                yield
        except (self._extension.CorruptArchive, Damage) as e:
            raise corrupt(self._path, str(e)) from None


class _Report:
    """Progress over stored and then compressed records."""

    def __init__(self, progress: ProgressCallback | None, compressed_nbytes: int) -> None:
        self._progress = progress
        self._left = compressed_nbytes
        self._total = compressed_nbytes

    def of_stored(self, bytes_done: int, bytes_total: int) -> None:
        self._total = bytes_total + self._left
        if self._progress is not None:
            self._progress(bytes_done, self._total)

    def add(self, nbytes: int) -> None:
        self._left -= nbytes
        if self._progress is not None:
            self._progress(self._total - self._left, self._total)
