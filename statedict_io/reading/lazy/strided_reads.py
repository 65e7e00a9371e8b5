"""Reading a strided view of a record without reading the whole record."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

#: a tile of a view is read in one piece, gaps included, if it is no larger
_MAX_TILE_NBYTES = 16 << 20
# Rows below this are never worth a read each where the gaps between them are cheap.
_SHORT_ROW_NBYTES = 32


class Rows(NamedTuple):
    """As of :meth:`~statedict_io.backends.protocol.OpenArchive.read_range`, of one record."""

    offset: int
    destination: memoryview
    num_rows: int = 1
    pitch: int = 0


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


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as integers: copies of some dtypes are not supported, or not bit by bit."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    return tensor.view(integers[tensor.element_size()]) if tensor.numel() else tensor


#: puts elements into a part of the target that may have another dtype, device or byte order
Copy = Callable[[torch.Tensor, torch.Tensor], Any]


def fills(
    target: torch.Tensor,
    offset: int,
    strides: Sequence[int],
    *,
    cheap_nbytes: int,
    max_overhead: float,
    dtype: torch.dtype | None = None,
    copy: Copy | None = None,
) -> Iterator[Rows]:
    """Fills a tensor from the view of a record with its shape, in the order of the record.

    Yields what is to be read. It has to be there when the next is asked for; the memory is used no more then.

    Args:
        target: with any strides. Without ``copy`` on the CPU, and raw bits count: its dtype has only to have the right
            size, and to be one that torch copies bit by bit where the strides are not those of the view
            (:func:`as_bits`).
        offset: of the view's first element, in elements.
        strides: of the view, in elements. Elements of dimensions without a stride are read once.
        cheap_nbytes: a piece that spans no more is read with its gaps: it takes as long as one byte.
        max_overhead: larger ones, up to 16 MiB, are if they have at most so many times the bytes of their elements.
        dtype: of the view; that of the target by default.
        copy: is given blocks of the view, on the CPU, and their places in the target.
    """
    if target.numel() == 0:
        return
    order = sorted(range(target.dim()), key=lambda dim: -strides[dim])
    target, strides = target.permute(order), [strides[dim] for dim in order]
    once = [1 if stride == 0 else size for size, stride in zip(target.shape, strides, strict=True)]
    if copy is None and target.is_contiguous() and list(target.shape) == once:
        yield from _fills_of_block(target, offset, strides, cheap_nbytes, max_overhead)
        return
    dtype = dtype or target.dtype
    for part, sizes, begin in _parts(target, once, offset, strides, dtype.itemsize):
        block = torch.empty(sizes, dtype=dtype, device="cpu")
        yield from _fills_of_block(as_bits(block), begin, strides, cheap_nbytes, max_overhead)
        if copy is None:
            part.copy_(block)
        else:
            copy(block, part)


def _parts(
    target: torch.Tensor, once: list[int], offset: int, strides: list[int], itemsize: int
) -> Iterator[tuple[torch.Tensor, list[int], int]]:
    """Parts of the target, one after the other, of at most 16 MiB, with the sizes and the offset of what to read for
    each."""
    pending = [(target, once, offset)]
    while pending:
        target, once, offset = pending.pop()
        if math.prod(once) * itemsize <= _MAX_TILE_NBYTES:
            yield target, once, offset
            continue
        dim = next(dim for dim, size in enumerate(once) if size > 1)
        half = once[dim] // 2
        for begin, size in ((half, once[dim] - half), (0, half)):
            sizes = [*once[:dim], size, *once[dim + 1 :]]
            pending.append((target.narrow(dim, begin, size), sizes, offset + begin * strides[dim]))


def _fills_of_block(
    block: torch.Tensor, offset: int, strides: list[int], cheap_nbytes: int, max_overhead: float
) -> Iterator[Rows]:
    """``block``: contiguous."""
    itemsize = block.element_size()
    pending = [(block, offset)]
    while pending:
        part, offset = pending.pop()
        rows = _rows(part.shape, strides) if part.is_contiguous() else None
        if rows is not None and rows.num_rows == 1:
            yield Rows(offset * itemsize, memory_of(part))
            continue
        with_gaps = rows is not None and (
            rows.pitch <= max_overhead * rows.run
            or (rows.run * itemsize < _SHORT_ROW_NBYTES and (rows.pitch - rows.run) * itemsize <= cheap_nbytes)
        )
        span = span_of(part.shape, strides)
        nbytes = span * itemsize
        if nbytes <= cheap_nbytes or (
            nbytes <= _MAX_TILE_NBYTES and (with_gaps or span <= max_overhead * part.numel())
        ):
            tile = torch.empty(span, dtype=part.dtype, device="cpu")
            yield Rows(offset * itemsize, memory_of(tile))
            part.copy_(tile.as_strided(part.shape, strides))
        elif rows is not None and not with_gaps:
            yield Rows(offset * itemsize, memory_of(part), rows.num_rows, rows.pitch * itemsize)
        else:
            # Halves of the dimension that reaches farthest.
            reach = [(length - 1) * stride for length, stride in zip(part.shape, strides, strict=True)]
            dim = reach.index(max(reach))
            half = part.shape[dim] // 2
            pending.append((part.narrow(dim, half, part.shape[dim] - half), offset + half * strides[dim]))
            pending.append((part.narrow(dim, 0, half), offset))


class _Pitched(NamedTuple):
    num_rows: int
    run: int  #: elements of each
    pitch: int  #: elements from the start of one to the start of the next


def _rows(shape: Sequence[int], strides: Sequence[int]) -> _Pitched | None:
    """A view as rows at one pitch; None where it has more dimensions than that."""
    merged: list[tuple[int, int]] = []  # (size, stride), neighbours that are one dimension in memory joined
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    run = merged.pop()[0] if merged and merged[-1][1] == 1 else 1
    num_rows, pitch = merged.pop() if merged else (1, run)
    return None if merged else _Pitched(num_rows, run, pitch)
