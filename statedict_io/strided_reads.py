"""Reading a strided view of a record without reading the whole record."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

#: a tile of a view is read in one piece, gaps included, if it is no larger
MAX_TILE_NBYTES = 16 << 20
#: fills the memory from the record's byte offset on
ReadInto = Callable[[int, memoryview], None]


def span_of(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last one of a view, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable; the tensor must outlive it."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())).cast("B")


def fill(out: torch.Tensor, offset: int, strides: Sequence[int], read_into: ReadInto, cheap_nbytes: int) -> None:
    """Fills ``out``, a contiguous tensor, from the view of a record with its shape.

    Reads at most twice the bytes of the view, or pieces so small that it does not matter.

    Args:
        out: raw bits count, its dtype has only to have the right size.
        offset: of the view's first element, in elements.
        strides: of the view, in elements.
        cheap_nbytes: a piece that spans no more is read with its gaps.
    """
    if out.numel() == 0:
        return
    itemsize = out.element_size()
    pending = [(out, offset, tuple(strides))]
    while pending:
        part, offset, strides = pending.pop()
        if part.is_contiguous() and _is_dense(part.shape, strides):
            read_into(offset * itemsize, memory_of(part))
            continue
        span = span_of(part.shape, strides)
        distinct = 1
        for length, stride in zip(part.shape, strides, strict=True):
            distinct *= length if stride else 1
        nbytes = span * itemsize
        if nbytes <= cheap_nbytes or (nbytes <= MAX_TILE_NBYTES and span <= 2 * distinct):
            tile = torch.empty(span, dtype=part.dtype, device="cpu")
            read_into(offset * itemsize, memory_of(tile))
            part.copy_(tile.as_strided(part.shape, strides))
            continue
        # Halves of the dimension that reaches farthest.
        reach = [(length - 1) * stride for length, stride in zip(part.shape, strides, strict=True)]
        dim = reach.index(max(reach))
        half = part.shape[dim] // 2
        pending.append((part.narrow(dim, half, part.shape[dim] - half), offset + half * strides[dim], strides))
        pending.append((part.narrow(dim, 0, half), offset, strides))


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
