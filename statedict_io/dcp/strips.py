"""A range of a shard as strips of the file. Pure arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from ..backends.protocol import Strip


def strips_of_range(
    shape: Sequence[int],
    offsets: Sequence[int],
    sizes: Sequence[int],
    itemsize: int,
    begin: int,
    end: int,
    *,
    source: int,
    source_offset: int,
    payload_offset: int,
) -> Iterator[Strip]:
    """The elements ``begin`` to ``end`` (exclusive) of a shard, whose tensor is a record of its own.

    Args:
        shape: of the tensor.
        offsets, sizes: of the shard in it, elements.
        itemsize: bytes of an element.
        begin, end: in the shard's own row-major order.
        source, source_offset: where the range is in memory, gapless: as of :class:`Strip`.
        payload_offset: of the record, in the file.

    Yields:
        Strips in that order, without gaps in the source: their sizes sum up to the range's.
    """
    if begin >= end:
        return
    strides = row_major_strides(shape, itemsize)
    # Dimensions from `inner` on are one run; those from `outer` to it are rows at one pitch.
    inner = len(shape)
    while inner > 0:
        inner -= 1
        if sizes[inner] != shape[inner]:
            break
    run = math.prod(sizes[inner:])
    outer = inner
    while outer > 0:
        outer -= 1
        if sizes[outer] != shape[outer]:
            break
    rows_per_block = math.prod(sizes[outer:inner])
    pitch = strides[inner - 1] if inner > 0 else run * itemsize
    block = run * rows_per_block
    record_nbytes = math.prod(shape) * itemsize
    base = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    first_block, last_block = begin // block, (end - 1) // block
    if outer == 0:
        starts: Iterator[int] = iter((base,))
    else:
        leading = itertools.product(
            *(range(0, size * stride, stride) for size, stride in zip(sizes, strides[:outer], strict=False))
        )
        starts = (base + sum(at) for at in itertools.islice(leading, first_block, last_block + 1))
    for index, start in enumerate(starts, first_block):
        from_ = max(begin - index * block, 0)
        to = min(end - index * block, block)
        for offset, row_nbytes, num_rows in _rows(start, run, pitch, itemsize, from_, to):
            yield Strip(
                source=source,
                source_offset=source_offset,
                file_offset=payload_offset + offset,
                row_nbytes=row_nbytes,
                num_rows=num_rows,
                file_pitch=pitch,
                nbytes_after=record_nbytes - (offset + (num_rows - 1) * pitch + row_nbytes),
            )
            source_offset += row_nbytes * num_rows


def _rows(start: int, run: int, pitch: int, itemsize: int, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(offset of the first row, bytes of each, how many) in a block of equal runs: a partial first run, whole ones, a
    partial last one."""
    row, column = divmod(begin, run)
    last_row, last_column = divmod(end, run)
    if column and row < last_row:
        yield start + row * pitch + column * itemsize, (run - column) * itemsize, 1
        row, column = row + 1, 0
    if row < last_row:
        yield start + row * pitch, run * itemsize, last_row - row
        row = last_row
    if last_column > column:
        yield start + row * pitch + column * itemsize, (last_column - column) * itemsize, 1


def position_of(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], element: int) -> int:
    """Of an element of a shard, in its row-major order, that in its tensor's; arguments as of
    :func:`strips_of_range`."""
    position, stride = 0, 1
    for length, offset, size in zip(reversed(shape), reversed(offsets), reversed(sizes), strict=True):
        element, index = divmod(element, size)
        position += (offset + index) * stride
        stride *= length
    return position


def strips_until(strip: Strip, offset: int) -> tuple[list[Strip], list[Strip]]:
    """What of a strip lies before an offset in the file, and what behind it; both in order, at most two each."""
    last = strip.num_rows - 1
    row, column = divmod(offset - strip.file_offset, strip.file_pitch) if last else (0, offset - strip.file_offset)
    if offset <= strip.file_offset:
        return [], [strip]
    if row > last or (row == last and column >= strip.row_nbytes):
        return [strip], []
    if column >= strip.row_nbytes:
        return [part_of_strip(strip, 0, row + 1)], [part_of_strip(strip, row + 1, last - row)]
    taken = [part_of_strip(strip, 0, row)] if row else []
    left = [part_of_strip(strip, row + 1, last - row)] if row < last else []
    if column:
        taken.append(part_of_strip(strip, row, 1, 0, column))
    return taken, [part_of_strip(strip, row, 1, column), *left]


def strips_of_at_most(strip: Strip, nbytes: int) -> Iterator[Strip]:
    """A strip in pieces: whole rows, or pieces of one where a row is longer."""
    if strip.row_nbytes >= nbytes:
        for row in range(strip.num_rows):
            for begin in range(0, strip.row_nbytes, nbytes):
                yield part_of_strip(strip, row, 1, begin, min(begin + nbytes, strip.row_nbytes))
        return
    step = nbytes // strip.row_nbytes
    for row in range(0, strip.num_rows, step):
        yield part_of_strip(strip, row, min(step, strip.num_rows - row))


def part_of_strip(strip: Strip, row: int, num_rows: int, begin: int = 0, end: int | None = None) -> Strip:
    """``num_rows`` from ``row`` on; of a single one the bytes from ``begin`` to ``end``."""
    end = strip.row_nbytes if end is None else end
    file_offset = strip.file_offset + row * strip.file_pitch + begin
    bytes_behind = (strip.num_rows - row - num_rows) * strip.file_pitch + strip.row_nbytes - end
    return Strip(
        source=strip.source,
        source_offset=strip.source_offset + row * strip.row_nbytes + begin,
        file_offset=file_offset,
        row_nbytes=end - begin,
        num_rows=num_rows,
        file_pitch=strip.file_pitch,
        nbytes_after=strip.nbytes_after + bytes_behind,
    )


def row_major_strides(shape: Sequence[int], itemsize: int) -> list[int]:
    """Of a contiguous tensor, in bytes."""
    strides = [itemsize] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return strides
