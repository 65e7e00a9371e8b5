"""Pieces of a file that are wanted, as the ranges in which they are read: neighbours together, large ones in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ..system.scattered import Read


class Piece(NamedTuple):
    """Bytes of a file, and where they go."""

    offset: int  #: in the file
    nbytes: int
    memory: memoryview | None  #: None: into memory that is there until :data:`Seen` has been called
    record: int = -1  #: of the payload that they are of; -1: they do not count
    position: int = 0  #: in that payload


#: Called with (record, position in its payload, bytes) of what has been read, in any thread.
Seen = Callable[[int, int, memoryview], None]


def reads_of(
    pieces: Sequence[Piece],
    *,
    max_gap_nbytes: int,
    max_read_nbytes: int,
    num_connections: int,
    seen: Seen | None = None,
) -> list[Read]:
    """In the order of the file.

    Args:
        max_gap_nbytes: what lies between two pieces is read with them if it is no more.
        max_read_nbytes: of one range.
        num_connections: so many ranges are read at one time: there are as many of the same size, or a multiple.
    """
    ordered = sorted((piece for piece in pieces if piece.nbytes), key=lambda piece: piece.offset)
    extents = [*_extents(ordered, max_gap_nbytes)]
    total = sum(extent[-1].offset + extent[-1].nbytes - extent[0].offset for extent in extents)
    num_rounds = -(-total // (num_connections * max_read_nbytes))
    num_reads = max(min(num_rounds * num_connections, total // _LEAST_READ_NBYTES), -(-total // max_read_nbytes), 1)
    wanted = -(-total // num_reads)
    gap = memoryview(bytearray(max_gap_nbytes))
    spare: list[bytearray] = []
    return [_read(part, gap, spare, seen) for extent in extents for part in _parts(extent, max(wanted, 1))]


#: A connection is not worth its round trip for less.
_LEAST_READ_NBYTES = 1 << 20


def _extents(pieces: Sequence[Piece], max_gap_nbytes: int) -> Iterator[list[Piece]]:
    """Neighbours, with pieces for what lies between them."""
    extent: list[Piece] = []
    end = 0
    for piece in pieces:
        if extent and not 0 <= piece.offset - end <= max_gap_nbytes:
            yield extent
            extent = []
        if extent and piece.offset > end:
            extent.append(_gap(end, piece.offset))
        extent.append(piece)
        end = piece.offset + piece.nbytes
    if extent:
        yield extent


def _gap(begin: int, end: int) -> Piece:
    return Piece(begin, end - begin, None)


def _parts(extent: list[Piece], wanted_nbytes: int) -> Iterator[list[Piece]]:
    """An extent in parts of one size."""
    begin, end = extent[0].offset, extent[-1].offset + extent[-1].nbytes
    num_parts = -(-(end - begin) // wanted_nbytes) or 1
    step = -(-(end - begin) // num_parts)
    part: list[Piece] = []
    limit = begin + step
    for piece in extent:
        while piece.offset + piece.nbytes > limit:
            inside = limit - piece.offset
            if inside > 0:
                part.append(_cut(piece, 0, inside))
                piece = _cut(piece, inside, piece.nbytes)
            yield part
            part = []
            limit += step
        part.append(piece)
    if part:
        yield part


def _cut(piece: Piece, begin: int, end: int) -> Piece:
    memory = None if piece.memory is None else piece.memory[begin:end]
    return Piece(piece.offset + begin, end - begin, memory, piece.record, piece.position + begin)


def _read(part: list[Piece], gap: memoryview, spare: list[bytearray], seen: Seen | None) -> Read:
    unkept = sum(piece.nbytes for piece in part if piece.memory is None and piece.record >= 0)
    held: list[bytearray] = []

    def begin() -> list[memoryview]:
        memory = memoryview(b"")
        if unkept:
            held.append(_taken(spare, unkept))
            memory = memoryview(held[0])
        buffers = []
        for piece in part:
            if piece.memory is not None:
                buffers.append(piece.memory)
            elif piece.record < 0:
                buffers.append(gap[: piece.nbytes])
            else:
                buffers.append(memory[: piece.nbytes])
                memory = memory[piece.nbytes :]
        return buffers

    def finish(buffers: Sequence[memoryview]) -> None:
        if seen is not None:
            for piece, buffer in zip(part, buffers, strict=True):
                if piece.record >= 0:
                    seen(piece.record, piece.position, buffer)
        spare.extend(held)
        held.clear()

    counted = sum(piece.nbytes for piece in part if piece.record >= 0)
    return Read(part[0].offset, sum(piece.nbytes for piece in part), begin, finish, counted)


def _taken(spare: list[bytearray], nbytes: int) -> bytearray:
    """Memory of at least so many bytes, used again: what is new has to be cleared first."""
    try:
        found = spare.pop()
    except IndexError:
        return bytearray(nbytes)
    return found if len(found) >= nbytes else bytearray(nbytes)
