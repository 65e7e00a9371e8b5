"""The payloads of an open file by name, of whatever format: records of an archive, tensors of a safetensors file."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ..archive.record_entry import RecordEntry
from ..backends.protocol import OpenArchive
from ..errors import CorruptCheckpointError, corrupt
from ..untrusted.limits import shown
from .opened_bytes import OpenedBytes

if TYPE_CHECKING:
    from ..archive.payload_ranges import RangeEntries


class StoredPayloads:
    """Owns nothing: what ``archive`` reads from must stay open. Used by one thread at a time."""

    def __init__(
        self,
        archive: OpenArchive,
        path: str,
        *,
        file_nbytes: int = 0,
        mtime_ns: int | None = None,
        descriptor: int | None = None,
        cheap_nbytes: int = 4 << 10,
    ) -> None:
        self.archive = archive
        self.path = path
        self.file_nbytes = file_nbytes
        self.mtime_ns = mtime_ns  #: as of OpenedBytes, like the two that follow
        self.descriptor = descriptor
        self.cheap_nbytes = cheap_nbytes
        self.entries = archive.records

    @functools.cached_property
    def _indices(self) -> dict[str, int]:
        return {entry.name: index for index, entry in enumerate(self.entries)}

    def __contains__(self, name: object) -> bool:
        return name in self._indices

    def names(self) -> list[str]:
        return list(self._indices)

    def index(self, name: str) -> int:
        """
        Raises:
            CorruptCheckpointError: there is no payload of that name.
        """
        found = self._indices.get(name)
        if found is None:
            raise corrupt(self.path, f"it has no record {shown(name)!r}, which its data.pkl asks for")
        return found

    def entry(self, name: str) -> RecordEntry:
        return self.entries[self.index(name)]

    def sized(self, name: str, nbytes: int) -> int:
        """The index of the payload ``name``, which is said to have ``nbytes``."""
        index = self.index(name)
        found = self.entries[index].nbytes
        if found != nbytes:
            raise corrupt(self.path, f"record {shown(name)!r} has {found} bytes, data.pkl says {nbytes}")
        return index

    def storages(self) -> list[int]:
        """Those of tensors, in the order in which they will be asked for."""
        return [*range(len(self.entries))]

    def has_crc(self, index: int) -> bool:
        """Whether the CRC of a payload was recorded."""
        del index
        return False

    def explained(self, error: CorruptCheckpointError) -> CorruptCheckpointError:
        """``error`` with what is known of the records that it is about."""
        return error


def payloads_in(opened: OpenedBytes, entries: RangeEntries) -> StoredPayloads:
    """Those of a file in a format without headers of its own for each."""
    return StoredPayloads(
        opened.open_payloads(entries),
        opened.name,
        file_nbytes=opened.nbytes,
        mtime_ns=opened.mtime_ns,
        descriptor=opened.descriptor,
        cheap_nbytes=opened.cheap_nbytes,
    )
