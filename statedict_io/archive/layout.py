"""The layout of archives for the Python backend: the same bytes as csrc/archive, docs/format.md section by section.
Names and sizes are checked only there: those of the Python backend come from paths and from storages."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_MAX16 = 0xFFFF
_MAX32 = 0xFFFFFFFF

_SERIALIZATION_ID = ".data/serialization_id"
_SERIALIZATION_ID_NBYTES = 40
DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
_FLAG_UTF8_NAME = 1 << 11
_FLAG_HAS_DESCRIPTOR = 1 << 3

_LOCAL_HEADER = struct.Struct("<4sHHHIIQHH")
_DESCRIPTOR = struct.Struct("<4sIII")
_DESCRIPTOR_64 = struct.Struct("<4sIQQ")
_ENTRY = struct.Struct("<4sIHHIIIIHHHIII")
_END_64 = struct.Struct("<4sQHHQQQQQ")
_END_64_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4sIHHIIH")


class RecordLayout(NamedTuple):
    name: str
    nbytes: int
    header_offset: int
    payload_offset: int
    header: bytes  #: local header, name, extra fields and padding: everything up to the payload
    entry_nbytes: int  #: of its entry in the central directory

    @property
    def end_offset(self) -> int:
        return self.payload_offset + self.nbytes + len(self.descriptor(0))

    def descriptor(self, crc: int) -> bytes:
        if self.nbytes == 0:
            return b""
        descriptor = _DESCRIPTOR_64 if _zip64_values(self.nbytes, self.header_offset) else _DESCRIPTOR
        return descriptor.pack(DESCRIPTOR_SIGNATURE, crc, self.nbytes, self.nbytes)


class ArchiveLayout:
    """Where every byte of an archive lies, from names and sizes alone.

    Args:
        archive_name: the prefix of all record names.
        records: (name, nbytes) in file order, without the serialization id, which is appended.
        alignment: of every payload's offset, bytes.
    """

    def __init__(self, archive_name: str, records: Iterable[tuple[str, int]], alignment: int) -> None:
        if not archive_name:
            raise ValueError("the archive name is empty")
        if not 0 < alignment <= _MAX32:
            raise ValueError(f"storage_alignment must be from 1 to 2^32 - 1, got {alignment}")
        self.archive_name = archive_name
        self.records: list[RecordLayout] = []
        cursor = 0
        for name, nbytes in [*records, (_SERIALIZATION_ID, _SERIALIZATION_ID_NBYTES)]:
            record = self._place(name, nbytes, cursor, alignment)
            self.records.append(record)
            cursor = record.end_offset
        self.directory_offset = cursor
        self.nbytes = (
            cursor
            + sum(record.entry_nbytes for record in self.records)
            + _END_64.size
            + _END_64_LOCATOR.size
            + _END.size
        )

    def _place(self, name: str, nbytes: int, offset: int, alignment: int) -> RecordLayout:
        full_name = f"{self.archive_name}/{name}".encode()
        # miniz does not know the stored size yet when it writes the local header: 0.
        zip64 = _zip64_extra(nbytes, offset, stored_nbytes=0)
        unpadded = offset + _LOCAL_HEADER.size + len(full_name) + len(zip64) + 4
        padding = -unpadded % alignment
        extra_nbytes = len(zip64) + 4 + padding
        header = _LOCAL_HEADER.pack(b"PK\x03\x04", 0, _flags(nbytes), 0, 0, 0, 0, len(full_name), extra_nbytes & _MAX16)
        padding_field = struct.pack("<2sH", b"FB", padding & _MAX16) + b"Z" * padding
        entry_nbytes = _ENTRY.size + len(full_name) + len(zip64)
        header += full_name + zip64 + padding_field
        return RecordLayout(name, nbytes, offset, unpadded + padding, header, entry_nbytes)

    def directory(self, crcs: Sequence[int]) -> bytes:
        """Central directory and end records; ``crcs`` has one a record, the serialization id's included."""
        entries = bytearray()
        for record, crc in zip(self.records, crcs, strict=True):
            full_name = f"{self.archive_name}/{record.name}".encode()
            zip64 = _zip64_extra(record.nbytes, record.header_offset, stored_nbytes=record.nbytes)
            nbytes = min(record.nbytes, _MAX32)
            entries += _ENTRY.pack(
                b"PK\x01\x02",
                0,
                _flags(record.nbytes),
                0,
                0,
                crc,
                nbytes,
                nbytes,
                len(full_name),
                len(zip64),
                0,
                0,
                0,
                min(record.header_offset, _MAX32),
            )
            entries += full_name + zip64
        count = len(self.records)
        end = _END_64.pack(b"PK\x06\x06", 44, 0x031E, 0x002D, 0, count, count, len(entries), self.directory_offset)
        end += _END_64_LOCATOR.pack(b"PK\x06\x07", 0, self.directory_offset + len(entries), 1)
        end += _END.pack(
            b"PK\x05\x06",
            0,
            min(count, _MAX16),
            min(count, _MAX16),
            min(len(entries), _MAX32),
            min(self.directory_offset, _MAX32),
            0,
        )
        return bytes(entries) + end


def _flags(nbytes: int) -> int:
    return _FLAG_UTF8_NAME | (_FLAG_HAS_DESCRIPTOR if nbytes else 0)


def _zip64_values(nbytes: int, header_offset: int) -> bool:
    return nbytes >= _MAX32 or header_offset >= _MAX32


def _zip64_extra(nbytes: int, header_offset: int, stored_nbytes: int) -> bytes:
    fields = b""
    if nbytes >= _MAX32:
        fields += struct.pack("<QQ", nbytes, stored_nbytes)
    if header_offset >= _MAX32:
        fields += struct.pack("<Q", header_offset)
    return struct.pack("<HH", 1, len(fields)) + fields if fields else b""
