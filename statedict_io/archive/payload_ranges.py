"""Payloads at known places of a file in another format, described as the records of an archive are.

They have neither headers nor names there, and no checksums.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .record_entry import RecordEntry


class PayloadRange(NamedTuple):
    """Where a payload lies in the file. Ranges of one file do not overlap."""

    offset: int
    nbytes: int
    alignment: int  #: that it needs in memory: a power of two


class RangeEntries(Sequence[RecordEntry]):
    """A record for each range, made when it is asked for: there may be a hundred thousand, and nothing in them."""

    def __init__(self, ranges: Iterable[PayloadRange], names: Sequence[str]) -> None:
        self._names = names
        self._offsets, self._sizes, self.alignments = array("Q"), array("Q"), array("H")
        for offset, nbytes, alignment in ranges:
            self._offsets.append(offset)
            self._sizes.append(nbytes)
            self.alignments.append(alignment)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        nbytes = self._sizes[index]
        return RecordEntry(self._names[index], self._offsets[index], nbytes, nbytes, 0, False)

    def ranges(self) -> list[PayloadRange]:
        return [*map(PayloadRange, self._offsets, self._sizes, self.alignments)]


class RangeDirectory:
    """In place of the :class:`~statedict_io.archive.directory.Directory` of an archive."""

    archive_name = ""

    def __init__(self, entries: RangeEntries) -> None:
        self.entries = entries

    def header_nbytes(self, record: int) -> int:
        """Of what :meth:`payload_offset` needs of a record's beginning."""
        return 0

    def limit_offset(self, record: int) -> int:
        """Where the record ends, or something else begins."""
        entry = self.entries[record]
        return entry.header_offset + entry.nbytes

    def payload_offset(self, record: int, header: bytes) -> int:
        del header
        return self.entries[record].header_offset
