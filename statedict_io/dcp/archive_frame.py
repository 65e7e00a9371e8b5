"""All of an archive but the payloads of its storages: headers, descriptors, the small records, the directory.

The coordinator's part of a many-rank save. Pure, but for :meth:`ArchiveFrame.write`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..archive.layout import DESCRIPTOR_SIGNATURE, ArchiveLayout, RecordLayout
from ..archive.serialization_id import SerializationId
from ..backends.strips import set_nbytes
from ..system.descriptors import write_all_at

_GATHER_NBYTES = 1 << 20


class Between(NamedTuple):
    """Bytes between two payloads of storages, or before the first or behind the last: all known but for one CRC."""

    offset: int  #: in the file
    data: bytes  #: with zeros for the CRC
    key: int | None  #: the storage whose CRC is missing
    crc_offset: int  #: of it, in the file


class ArchiveFrame:
    """Where every byte lies, once names, sizes and the small records are known.

    Args:
        archive_name: prefix of all record names.
        head: (name, content) of the records before the storages.
        storage_nbytes: of ``data/0``, ``data/1``, ...
        tail: (name, content) of the records after the storages.
        alignment: of payload offsets, bytes.
    """

    def __init__(
        self,
        archive_name: str,
        head: Sequence[tuple[str, bytes]],
        storage_nbytes: Sequence[int],
        tail: Sequence[tuple[str, bytes]],
        alignment: int,
    ) -> None:
        sizes = [(name, len(content)) for name, content in head]
        sizes += [(f"data/{key}", nbytes) for key, nbytes in enumerate(storage_nbytes)]
        sizes += [(name, len(content)) for name, content in tail]
        self.layout = ArchiveLayout(archive_name, sizes, alignment)
        self._contents = {**dict(head), **dict(tail)}
        self._first_storage = len(head)
        self._num_storages = len(storage_nbytes)

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return self.layout.nbytes

    def storage(self, key: int) -> RecordLayout:
        """The record ``data/key``."""
        return self.layout.records[self._first_storage + key]

    def storages(self) -> Sequence[RecordLayout]:
        return self.layout.records[self._first_storage : self._first_storage + self._num_storages]

    @property
    def storages_end(self) -> int:
        """Where the last storage ends, with its descriptor; 0 where there is none."""
        return self.storages()[-1].end_offset if self._num_storages else 0

    def between_storages(self, *, compute_crc32: bool) -> Iterator[Between]:
        """All up to :attr:`storages_end` but the storages, in file order."""
        if not self._num_storages:
            return
        first = self._first_storage
        head = b""
        for record in self.layout.records[:first]:
            content = self._contents[record.name]
            crc = zlib.crc32(content) if compute_crc32 else 0
            head += record.header + content + record.descriptor(crc)
        offset, key, crc_offset = 0, None, 0
        for index, record in enumerate(self.storages()):
            yield Between(offset, head + record.header, key, crc_offset)
            offset = record.payload_offset + record.nbytes
            head = record.descriptor(0)
            has_crc = bool(head) and compute_crc32
            key, crc_offset = (index if has_crc else None), offset + len(DESCRIPTOR_SIGNATURE)
        if head:
            yield Between(offset, head, key, crc_offset)

    def write(
        self, fd: int, storage_crcs: Sequence[int], first_bytes: Mapping[int, bytes], *, compute_crc32: bool
    ) -> None:
        """Writes what nobody else has written, and sets the file's size.

        Args:
            fd: open for writing.
            storage_crcs, first_bytes: as of :meth:`pieces`.
        """
        out = _Gathered(fd)
        for offset, data in self.pieces(storage_crcs, first_bytes, compute_crc32=compute_crc32):
            out.put(offset, data)
        out.flush()
        set_nbytes(fd, self.nbytes)

    def pieces(
        self, storage_crcs: Sequence[int], first_bytes: Mapping[int, bytes], *, compute_crc32: bool
    ) -> Iterator[tuple[int, bytes]]:
        """All but the storages: (offset, bytes), in file order.

        Args:
            storage_crcs: of ``data/0``, ``data/1``, ...
            first_bytes: storage -> its first eight bytes, where they look like the start of a data descriptor.
        """
        crcs: list[int] = []
        serialization_id = SerializationId()
        for index, record in enumerate(self.layout.records):
            key = index - self._first_storage
            content = self._contents.get(record.name)
            is_id = index == len(self.layout.records) - 1
            if is_id:
                content = serialization_id.digits([r.name for r in self.layout.records[:-1]])
            else:
                serialization_id.fold_write_start(f"{self.layout.archive_name}/{record.name}".encode())
            yield record.header_offset, record.header
            if content is None:
                crc = storage_crcs[key]
                if key in first_bytes:
                    serialization_id.fold_write_start(first_bytes[key])
            else:
                crc = zlib.crc32(content) if compute_crc32 else 0
                if not is_id:
                    serialization_id.fold_write_start(content)
                yield record.payload_offset, content
            crcs.append(crc)
            if record.nbytes:
                yield record.payload_offset + record.nbytes, record.descriptor(crc)
                if not is_id:
                    serialization_id.fold_crc(crc)
        yield self.layout.directory_offset, self.layout.directory(crcs)


class _Gathered:
    """Makes one write of bytes that follow each other."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._offset = 0
        self._bytes = bytearray()

    def put(self, offset: int, data: bytes) -> None:
        if offset != self._offset + len(self._bytes) or len(self._bytes) >= _GATHER_NBYTES:
            self.flush()
            self._offset = offset
        self._bytes += data

    def flush(self) -> None:
        write_all_at(self._fd, self._bytes, self._offset)
        self._bytes = bytearray()
