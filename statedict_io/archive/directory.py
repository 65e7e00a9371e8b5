"""End records and central directory for the Python backend: csrc/archive/{end_records,directory}.cpp line by line.

Pure: bytes in, records out. This is the gate that hostile archives have to pass: whatever comes out lies within the
file and no record overlaps another, so that all stored payloads together are no larger than the file. Raises
:class:`Damage`; the caller knows the path and adds it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .inflate import Damage
from .record_entry import RecordEntry

_MAX16 = 0xFFFF
_MAX32 = 0xFFFFFFFF
_END_NBYTES = 22
_LOCATOR_NBYTES = 20
_ZIP64_END_NBYTES = 56
_CENTRAL_NBYTES = 46
LOCAL_NBYTES = 30
_STORED, _DEFLATE = 0, 8
_FLAG_ENCRYPTED = 1
_FLAG_HAS_DESCRIPTOR = 1 << 3
# A deflate stream repeats at most 258 bytes with 2 bits.
_MAX_DEFLATE_RATIO = 1032


@dataclass(frozen=True)
class Directory:
    """The records in directory order, and for each its full name and where the next structure of the file begins."""

    archive_name: str
    entries: list[RecordEntry]
    full_names: list[bytes]
    limit_offsets: list[int]

    def header_nbytes(self, record: int) -> int:
        """Of a local header's beginning: its fields and the name."""
        return LOCAL_NBYTES + len(self.full_names[record])

    def limit_offset(self, record: int) -> int:
        """Where the next structure of the file begins."""
        return self.limit_offsets[record]

    def payload_offset(self, record: int, header: bytes) -> int:
        """From the local header, of which ``header`` has the first :meth:`header_nbytes`."""
        entry, name = self.entries[record], self.full_names[record]
        if header[:4] != b"PK\x03\x04":
            raise self._damage(record, f"no local header at offset {entry.header_offset}")
        flags, method, stored_nbytes, nbytes, name_nbytes, extra_nbytes = struct.unpack_from("<6xHH8xIIHH", header)
        if name_nbytes != len(name) or header[LOCAL_NBYTES : LOCAL_NBYTES + name_nbytes] != name:
            raise self._damage(record, "its local header has another name than the central directory")

        def agrees(local: int, central: int) -> bool:
            # Sizes may be in a zip64 field, or after the payload.
            return local in (central, _MAX32) or (bool(flags & _FLAG_HAS_DESCRIPTOR) and local == 0)

        if (
            method != (_DEFLATE if entry.compressed else _STORED)
            or not agrees(stored_nbytes, entry.stored_nbytes)
            or not agrees(nbytes, entry.nbytes)
        ):
            raise self._damage(record, "its local header contradicts the central directory")
        offset = entry.header_offset + LOCAL_NBYTES + name_nbytes + extra_nbytes
        if offset + entry.stored_nbytes > self.limit_offsets[record]:
            limit = self.limit_offsets[record]
            raise self._damage(record, f"its payload reaches past offset {limit}, where the next structure begins")
        return offset

    def _damage(self, record: int, problem: str) -> Damage:
        return _record_damage(self.full_names[record], problem)


def read_directory(read_at: Callable[[int, int], bytes], file_nbytes: int) -> Directory:
    """Reads the directory of a file of ``file_nbytes``; ``read_at(offset, nbytes)`` gives all of what it is asked for,
    and is asked for nothing outside the file."""
    offset, nbytes, num_records = _placement(read_at, file_nbytes)
    if nbytes > _MAX32:
        raise Damage("a central directory of 4 GiB or more, which torch cannot read either")
    if num_records > nbytes // _CENTRAL_NBYTES:
        raise Damage(f"the end record counts {num_records} records in {nbytes} bytes of directory")
    data = read_at(offset, nbytes)
    names: list[bytes] = []
    fields: list[tuple[int, int, int, int, bool]] = []
    at = 0
    for index in range(num_records):
        at = _parse_record(data, at, index, offset, names, fields)
    if at != len(data) and data[at : at + 4] != b"PK\x05\x05":  # a digital signature may follow
        raise Damage(f"the central directory goes on after its {num_records} records")
    seen: set[bytes] = set()
    for name in names:
        if name in seen:
            raise _record_damage(name, "two records have this name")
        seen.add(name)
    folder = names[0].partition(b"/")[0] + b"/" if names and b"/" in names[0] else b""
    del seen, data
    entries: list[Any] = fields  # in place: an archive may have a million records and nothing in them
    for index, name in enumerate(names):
        header_offset, size, stored, crc, compressed = fields[index]
        shown = name[len(folder) :] if folder and name.startswith(folder) else name
        entries[index] = RecordEntry(shown.decode(errors="replace"), header_offset, size, stored, crc, compressed)
    return Directory(folder[:-1].decode(errors="replace"), entries, names, _limits(entries, names, offset))


def _record_damage(name: bytes, problem: str) -> Damage:
    return Damage(f"record {name[:200].decode(errors='replace')!r}: {problem}")


def _placement(read_at: Callable[[int, int], bytes], file_nbytes: int) -> tuple[int, int, int]:
    """(offset, nbytes, number of records) of the central directory."""
    if file_nbytes < _END_NBYTES:
        raise Damage("no zip archive: shorter than its end record")
    # A comment of up to 64 KiB may follow the end record.
    tail_nbytes = min(file_nbytes, _MAX16 + _END_NBYTES + _LOCATOR_NBYTES + _ZIP64_END_NBYTES)
    tail = read_at(file_nbytes - tail_nbytes, tail_nbytes)
    at = tail.rfind(b"PK\x05\x06", 0, tail_nbytes - _END_NBYTES + 4)  # the last one counts, as for torch
    if at < 0:
        raise Damage("no end of a zip archive: cut off, or another format")
    disk, directory_disk, here, count, nbytes, offset = struct.unpack_from("<HHHHII", tail, at + 4)
    _check_one_disk(disk, directory_disk)
    if here != count:
        raise Damage("one part of a zip archive of several")
    limit = end_offset = file_nbytes - tail_nbytes + at
    if at >= _LOCATOR_NBYTES and tail[at - _LOCATOR_NBYTES : at - _LOCATOR_NBYTES + 4] == b"PK\x06\x07":
        limit = struct.unpack_from("<Q", tail, at - _LOCATOR_NBYTES + 8)[0]
        if limit > end_offset - _LOCATOR_NBYTES - _ZIP64_END_NBYTES:
            raise Damage(f"the zip64 locator points to offset {limit}, behind itself")
        zip64 = read_at(limit, _ZIP64_END_NBYTES)
        if zip64[:4] != b"PK\x06\x06":
            raise Damage("no zip64 end record where the locator points")
        disk, directory_disk, here64, count64, nbytes64, offset64 = struct.unpack_from("<IIQQQQ", zip64, 16)
        _check_one_disk(disk, directory_disk)
        if (
            here64 != count64
            or count not in (count64, _MAX16)
            or nbytes not in (nbytes64, _MAX32)
            or offset not in (offset64, _MAX32)
        ):
            raise Damage("the end records contradict each other")
        count, nbytes, offset = count64, nbytes64, offset64
    if offset + nbytes > limit:
        raise Damage(f"the central directory ({nbytes} bytes at offset {offset}) does not end before its end record")
    return offset, nbytes, count


def _check_one_disk(disk: int, directory_disk: int) -> None:
    # Archives of several disks count from 0, or from 1 in one piece (miniz takes both).
    if disk != directory_disk or disk > 1:
        raise Damage("one part of a zip archive of several")


def _parse_record(
    data: bytes,
    at: int,
    index: int,
    directory_offset: int,
    names: list[bytes],
    fields: list[tuple[int, int, int, int, bool]],
) -> int:
    """Appends what the header at ``at`` says; returns where the next one is."""
    where = f"in the central directory at offset {directory_offset + at}"
    if len(data) - at < _CENTRAL_NBYTES or data[at : at + 4] != b"PK\x01\x02":
        raise Damage(f"no header of record {index} {where}")
    flags, method, crc, stored, nbytes, name_nbytes, extra_nbytes, comment_nbytes, disk, header_offset = (
        struct.unpack_from("<8xHH4xIIIHHHH6xI", data, at)
    )
    name_at = at + _CENTRAL_NBYTES
    following = name_at + name_nbytes + extra_nbytes + comment_nbytes
    if following > len(data):
        raise Damage(f"the header of record {index} is cut off {where}")
    name = data[name_at : name_at + name_nbytes]
    if _MAX32 in (nbytes, stored, header_offset):
        extra = data[name_at + name_nbytes : name_at + name_nbytes + extra_nbytes]
        nbytes, stored, header_offset = _zip64_values(name, extra, nbytes, stored, header_offset)
    if flags & _FLAG_ENCRYPTED:
        raise _record_damage(name, "is encrypted, and torch.load cannot read it either")
    if method not in (_STORED, _DEFLATE):
        raise _record_damage(name, f"is compressed by method {method}, only deflate can be read")
    if disk > 1:
        raise _record_damage(name, "lies in another part of an archive of several")
    if method == _STORED and nbytes != stored:
        raise _record_damage(name, f"is not compressed, but has {stored} bytes in the file for {nbytes}")
    if method == _DEFLATE and nbytes // _MAX_DEFLATE_RATIO > stored:
        raise _record_damage(name, f"claims {nbytes} bytes from {stored} compressed ones, more than deflate can hold")
    names.append(name)
    fields.append((header_offset, nbytes, stored, crc, method == _DEFLATE))
    return following


def _zip64_values(name: bytes, extra: bytes, *values: int) -> list[int]:
    """``values`` with those that hold the mark of not fitting taken, in order, from the zip64 field."""
    at = 0
    while len(extra) - at >= 4:
        tag, nbytes = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            field = extra[at + 4 : at + 4 + nbytes]
            break
        at += 4 + nbytes
    else:
        return list(values)  # without the field it is a size like others
    resolved = []
    for value in values:
        if value == _MAX32:
            if len(field) < 8:
                raise _record_damage(name, "its zip64 field is cut off")
            value, field = int.from_bytes(field[:8], "little"), field[8:]
        resolved.append(value)
    return resolved


def _limits(entries: list[RecordEntry], names: list[bytes], directory_offset: int) -> list[int]:
    limits = [0] * len(entries)
    limit, what = directory_offset, "the central directory begins"
    for index in sorted(range(len(entries)), key=lambda i: entries[i].header_offset, reverse=True):
        entry = entries[index]
        limits[index] = limit
        if entry.header_offset + LOCAL_NBYTES + len(names[index]) + entry.stored_nbytes > limit:
            problem = f"{entry.stored_nbytes} bytes at offset {entry.header_offset} reach past offset {limit}, where "
            raise _record_damage(names[index], problem + what)
        limit, what = entry.header_offset, "the next record begins"
    return limits
