"""A range of a record, or rows of it at one pitch, in pieces that several threads can read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..archive.record_entry import RecordEntry

_PIECE_NBYTES = 8 << 20


class Piece(NamedTuple):
    offset: int  #: in the payload
    destination: memoryview
    num_rows: int


def pieces(entry: RecordEntry, offset: int, destination: memoryview, num_rows: int, pitch: int) -> Iterator[Piece]:
    """As :meth:`~statedict_io.backends.protocol.OpenArchive.read_range` takes them, each of at most 8 MiB or of one
    row.

    Raises:
        ValueError: the record has no such bytes, or is compressed.
    """
    nbytes = destination.nbytes
    row_nbytes = check_rows(entry, offset, destination, num_rows, pitch)
    if num_rows == 1:
        for at in range(0, nbytes, _PIECE_NBYTES):
            yield Piece(offset + at, destination[at : at + _PIECE_NBYTES], 1)
    elif nbytes:
        step = max(_PIECE_NBYTES // row_nbytes, 1)
        for first in range(0, num_rows, step):
            count = min(step, num_rows - first)
            at = first * row_nbytes
            yield Piece(offset + first * pitch, destination[at : at + count * row_nbytes], count)


def check_rows(entry: RecordEntry, offset: int, destination: memoryview, num_rows: int, pitch: int) -> int:
    """The bytes of a row.

    Raises:
        ValueError: the record has no such bytes, or is compressed.
    """
    nbytes = destination.nbytes
    row_nbytes, rest = divmod(nbytes, num_rows) if num_rows > 0 else (0, 1)
    end = offset + (num_rows - 1) * pitch + row_nbytes
    if entry.compressed or rest or offset < 0 or pitch < 0 or max(offset + row_nbytes, end) > entry.nbytes:
        raise ValueError(f"no range of {entry.name}: {num_rows} rows, {nbytes} bytes, from byte {offset} to {end}")
    return row_nbytes
