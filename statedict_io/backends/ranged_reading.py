"""Reading an archive by ranges that take a round trip each: see :class:`~statedict_io.backends.protocol.OpenArchive`.

The directory tells where a record begins; where its payload does is said by the header before it. As writers place them
that can be told from where the next record begins: header and payload are read at once, from where the payload should
be straight into its memory, and only if the header says otherwise that is read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from ..archive.record_rows import RowsOfRecord
from ..progress import ProgressCallback, over_parts
from ..system.scattered import Read
from .checksum import crc32
from .file_pieces import Piece, Seen, reads_of
from .python_reading import NETWORK, Checksums, PositionalSource, PythonOpenArchive, new_storage, storage_memory
from .record_rows import check_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..archive.payload_ranges import RangeEntries

# What lies between two pieces and is no more than this is read with them: a round trip costs more.
_MAX_GAP_NBYTES = 256 << 10
# Beside the tensors, of what is only checked.
_CHECKED_NBYTES = 8 << 20
_MAX_HEADER_NBYTES = 64 << 10
_MAX32 = 0xFFFFFFFF
_MAX_HEADERS_AHEAD = 1024
_MAX_KEPT_NBYTES = 8 << 20


class RangeSource(PositionalSource, Protocol):
    num_connections: int  #: so many ranges are read at one time
    max_read_nbytes: int  #: of a range

    def keep(self, spans: Sequence[tuple[int, int]]) -> None:
        """Reads what will be asked for in small pieces, given as (begin, end), at once."""

    def read_ranges(self, reads: Sequence[Read], tick: Callable[[int], object] | None = None) -> None:
        """Reads all; ``tick`` is called in this thread with the progress.

        Raises:
            EOFError: the source has fewer bytes.
        """


class RangedOpenArchive(PythonOpenArchive):
    """Arguments as of :class:`~statedict_io.backends.python_reading.PythonOpenArchive`."""

    def __init__(self, source: RangeSource, path: str, *, payloads: RangeEntries | None = None) -> None:
        super().__init__(source, path, NETWORK, payloads=payloads)
        self._ranges = source
        self._known_offsets: dict[int, int] = {}  #: of payloads, by record
        self._order: list[int]  #: the records as they lie in the file
        self._place: dict[int, int] = {}  #: in that order
        self._num_ahead = 1
        self.gathered_nbytes = source.num_connections * source.max_read_nbytes
        self._order = sorted(range(len(self.records)), key=lambda record: self.records[record].header_offset)
        if payloads is None:
            self._guarded(self._keep_small_records)

    def payload_offset(self, record: int) -> int:
        """Who asks for one may ask for all: further headers are read along, more and more of them."""
        if record not in self._known_offsets and self._exact(record) is None:
            if not self._place:
                self._place = {r: place for place, r in enumerate(self._order)}
            place = self._place[record]
            self._guarded(lambda: self._read_headers(self._order[place : place + self._num_ahead]))
            self._num_ahead = min(2 * self._num_ahead, _MAX_HEADERS_AHEAD)
        return self._offset(record)

    def read_range(self, record: int, offset: int, destination: memoryview, num_rows: int = 1, pitch: int = 0) -> None:
        self.read_rows([RowsOfRecord(record, offset, destination, num_rows, pitch)])

    def read_rows(self, wanted: Sequence[RowsOfRecord]) -> None:
        """As :meth:`read_range`, all of them side by side, neighbours together."""
        for rows in wanted:
            check_rows(self.records[rows.record], rows.offset, rows.destination, rows.num_rows, rows.pitch)
        self._guarded(lambda: self._read_rows([rows for rows in wanted if rows.destination.nbytes]))

    def load_storages(
        self, records: Sequence[int], *, verify: bool, progress: ProgressCallback | None
    ) -> list[torch.UntypedStorage]:
        stored = sorted({record for record in records if not self.records[record].compressed})
        inflated = sorted({record for record in records if self.records[record].compressed})
        sizes = [self._payload_nbytes(stored), self._payload_nbytes(inflated)]
        of_stored, of_inflated = over_parts(progress, sizes)
        storages: dict[int, torch.UntypedStorage] = {}
        checks = Checksums() if verify else None
        self._guarded(lambda: self._load(stored, storages, checks, of_stored))
        if checks is not None:
            wrong = [record for record in stored if checks.of(record) != self.records[record].crc32]
            if wrong:
                raise self._checksum_error(wrong)
        if inflated:
            loaded = super().load_storages(inflated, verify=verify, progress=of_inflated)
            storages.update(zip(inflated, loaded, strict=True))
        return [storages[record] for record in records]

    def checksums(self, records: Sequence[int], *, progress: ProgressCallback | None) -> list[int]:
        stored = sorted({record for record in records if not self.records[record].compressed})
        inflated = sorted({record for record in records if self.records[record].compressed})
        of_stored, of_inflated = over_parts(progress, [self._payload_nbytes(stored), self._payload_nbytes(inflated)])
        checks = Checksums()
        self._guarded(lambda: self._load(stored, None, checks, of_stored))
        found = {record: checks.of(record) for record in stored}
        if inflated:
            found.update(zip(inflated, super().checksums(inflated, progress=of_inflated), strict=True))
        return [found[record] for record in records]

    def _keep_small_records(self) -> None:
        """Those before and behind the storages, of which each will be asked for by itself."""
        storages = [record for record in self._order if self.records[record].name.startswith("data/")]
        if not storages:
            return
        first, last = self.records[storages[0]].header_offset, self._directory.limit_offset(storages[-1])
        around = (0, first), (last, self._directory.limit_offset(self._order[-1]))
        self._ranges.keep([(begin, end) for begin, end in around if 0 < end - begin <= _MAX_KEPT_NBYTES])

    def _load(
        self,
        records: Sequence[int],
        storages: dict[int, torch.UntypedStorage] | None,
        checks: Checksums | None,
        progress: ProgressCallback | None,
    ) -> None:
        """Reads payloads that are not compressed.

        Args:
            storages: gets them, by record; None: nobody wants them.
            checks: gets their CRCs.
        """
        if not records:
            return
        self._read_headers([record for record in records if self._expected(record) is None])
        headers: dict[int, memoryview] = {}
        pieces = []
        for record in records:
            entry, offset = self.records[record], self._expected(record)
            assert offset is not None
            if record not in self._known_offsets and self._exact(record) is None:
                header = headers[record] = memoryview(bytearray(offset - entry.header_offset))
                pieces.append(Piece(entry.header_offset, len(header), header))
            memory = None
            if storages is not None:
                storage = storages[record] = new_storage(entry.nbytes)
                memory = storage_memory(storage)
            pieces.append(Piece(offset, entry.nbytes, memory, record))

        def check(record: int, position: int, data: memoryview) -> None:
            assert checks is not None
            checks.add(record, crc32(data), self.records[record].nbytes - position - len(data))

        total = self._payload_nbytes(records)
        max_read_nbytes = self._ranges.max_read_nbytes
        if storages is None:
            max_read_nbytes = min(max_read_nbytes, _CHECKED_NBYTES)
        self._read(
            pieces,
            check if checks is not None else None,
            None if progress is None else lambda done: progress(done, total),
            max_read_nbytes,
        )
        elsewhere = self._learn(headers)
        if elsewhere and checks is not None:
            checks.forget(elsewhere)
        self._load(elsewhere, storages, checks, None)

    def _read_rows(self, wanted: Sequence[RowsOfRecord]) -> None:
        records = {rows.record: None for rows in wanted}
        self._read_headers([record for record in records if self._expected(record) is None])
        headers: dict[int, memoryview] = {}
        pieces = []
        for record in records:
            if record not in self._known_offsets and self._exact(record) is None:
                header = headers[record] = memoryview(bytearray(self._directory.header_nbytes(record)))
                pieces.append(Piece(self.records[record].header_offset, len(header), header))
        for rows in wanted:
            offset = self._expected(rows.record)
            assert offset is not None
            row_nbytes = rows.destination.nbytes // rows.num_rows
            for row in range(rows.num_rows):
                into = rows.destination[row * row_nbytes : (row + 1) * row_nbytes]
                pieces.append(Piece(offset + rows.offset + row * rows.pitch, row_nbytes, into))
        self._read(pieces)
        elsewhere = {*self._learn(headers)}
        if elsewhere:
            self._read_rows([rows for rows in wanted if rows.record in elsewhere])

    def _read_headers(self, records: Iterable[int]) -> None:
        headers = {
            record: memoryview(bytearray(self._directory.header_nbytes(record)))
            for record in records
            if record not in self._known_offsets
        }
        self._read(
            [Piece(self.records[record].header_offset, len(header), header) for record, header in headers.items()]
        )
        self._learn(headers)

    def _read(
        self,
        pieces: list[Piece],
        seen: Seen | None = None,
        tick: Callable[[int], object] | None = None,
        max_read_nbytes: int | None = None,
    ) -> None:
        reads = reads_of(
            pieces,
            max_gap_nbytes=_MAX_GAP_NBYTES,
            max_read_nbytes=max_read_nbytes or self._ranges.max_read_nbytes,
            num_connections=self._ranges.num_connections,
            seen=seen,
        )
        self._ranges.read_ranges(reads, tick)

    def _learn(self, headers: dict[int, memoryview]) -> list[int]:
        """Takes down where payloads are. Returns the records that were expected elsewhere.

        Raises:
            Damage: a header contradicts the directory.
        """
        elsewhere = []
        for record, header in headers.items():
            expected = self._expected(record)
            found = self._directory.payload_offset(record, bytes(header))
            self._known_offsets[record] = found
            if found != expected:
                elsewhere.append(record)
        return elsewhere

    def _offset(self, record: int) -> int:
        exact = self._exact(record)
        return self._known_offsets[record] if exact is None else exact

    def _exact(self, record: int) -> int | None:
        """The payload's offset, where there are no headers."""
        return self.records[record].header_offset if self._directory.header_nbytes(record) == 0 else None

    def _expected(self, record: int) -> int | None:
        """Where the payload is, or should be; None if nothing can be said."""
        exact = self._known_offsets.get(record, self._exact(record))
        if exact is not None:
            return exact
        entry = self.records[record]
        begin = entry.header_offset + self._directory.header_nbytes(record)
        for descriptor_nbytes in (_descriptor_nbytes(entry.nbytes, entry.header_offset), 0):
            offset = self._directory.limit_offset(record) - descriptor_nbytes - entry.nbytes
            if begin <= offset <= entry.header_offset + _MAX_HEADER_NBYTES:
                return offset
        return None


def _descriptor_nbytes(nbytes: int, header_offset: int) -> int:
    """Of what torch writes behind a payload (docs/format.md)."""
    if nbytes == 0:
        return 0
    return 24 if nbytes >= _MAX32 or header_offset >= _MAX32 else 16
