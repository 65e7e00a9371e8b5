"""All of an archive but the payloads of its storages: headers, descriptors, the small records, the directory.

The coordinator's part of a many-rank save. Pure until :meth:`ArchiveFrame.write`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from ..archive.layout import ArchiveLayout, RecordLayout
from ..archive.serialization_id import SerializationId
from ..backends.strips import set_nbytes
from ..system.descriptors import write_all_at

_GATHER_NBYTES = 1 << 20


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

    def write(
        self, fd: int, storage_crcs: Sequence[int], first_bytes: Mapping[int, bytes], *, compute_crc32: bool
    ) -> None:
        """Writes what nobody else has written, and sets the file's size.

        Args:
            fd: open for writing.
            storage_crcs: of ``data/0``, ``data/1``, ...
            first_bytes: storage -> its first eight bytes, where they look like the start of a data descriptor.
        """
        crcs: list[int] = []
        serialization_id = SerializationId()
        out = _Gathered(fd)
        for index, record in enumerate(self.layout.records):
            key = index - self._first_storage
            content = self._contents.get(record.name)
            is_id = index == len(self.layout.records) - 1
            if is_id:
                content = serialization_id.digits([r.name for r in self.layout.records[:-1]])
            else:
                serialization_id.fold_write_start(f"{self.layout.archive_name}/{record.name}".encode())
            out.put(record.header_offset, record.header)
            if content is None:
                crc = storage_crcs[key]
                if key in first_bytes:
                    serialization_id.fold_write_start(first_bytes[key])
            else:
                crc = zlib.crc32(content) if compute_crc32 else 0
                if not is_id:
                    serialization_id.fold_write_start(content)
                out.put(record.payload_offset, content)
            crcs.append(crc)
            if record.nbytes:
                out.put(record.payload_offset + record.nbytes, record.descriptor(crc))
                if not is_id:
                    serialization_id.fold_crc(crc)
        out.put(self.layout.directory_offset, self.layout.directory(crcs))
        out.flush()
        set_nbytes(fd, self.nbytes)


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
