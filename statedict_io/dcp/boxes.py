"""A box of a tensor as runs of bytes: what a shard is in a file. Pure arithmetic, for the writer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Rows(NamedTuple):
    """Runs of bytes of one length, at one distance from each other."""

    offset: int  #: of the first, from the tensor's first byte
    nbytes: int  #: of each
    num_rows: int
    pitch: int  #: from the start of one to the start of the next

    @property
    def end(self) -> int:
        return self.offset + (self.num_rows - 1) * self.pitch + self.nbytes


def rows_of_box(
    shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], itemsize: int, begin: int, end: int
) -> Iterator[Rows]:
    """Where the elements ``begin`` to ``end`` (exclusive) of a box lie in a contiguous tensor.

    Args:
        shape: of the tensor.
        offsets, sizes: of the box in it, elements.
        itemsize: bytes of an element.
        begin, end: in the box's own row-major order.

    Yields:
        Rows in that order, without gaps: their sizes sum up to the range's.
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
    num_rows = math.prod(sizes[outer:inner])
    pitch = strides[inner - 1] if inner > 0 else run * itemsize
    block = run * num_rows
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
        yield from _rows_of_range(start, run, pitch, itemsize, from_, to)


def _rows_of_range(start: int, run: int, pitch: int, itemsize: int, begin: int, end: int) -> Iterator[Rows]:
    """Of a block of equal runs: a partial first run, whole ones, a partial last one."""
    row, column = divmod(begin, run)
    last_row, last_column = divmod(end, run)
    if column and row < last_row:
        yield Rows(start + row * pitch + column * itemsize, (run - column) * itemsize, 1, pitch)
        row, column = row + 1, 0
    if row < last_row:
        yield Rows(start + row * pitch, run * itemsize, last_row - row, pitch)
        row = last_row
    if last_column > column:
        yield Rows(start + row * pitch + column * itemsize, (last_column - column) * itemsize, 1, pitch)


def row_major_strides(shape: Sequence[int], itemsize: int) -> list[int]:
    """Of a contiguous tensor, in bytes."""
    strides = [itemsize] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return strides
