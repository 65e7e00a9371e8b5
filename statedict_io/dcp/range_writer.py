"""A rank's side of one save: its ranges of its shards, as strips of the file."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from ..archive.layout import DESCRIPTOR_SIGNATURE
from ..backends.protocol import Backend, Strip
from .orders import WorkOrder, Written
from .strips import strips_of_range

# What one write may hold in memory beyond the state itself: copies of tensors that are not contiguous, and tensors that
# a planner makes while it is asked for them.
_COPIES_NBYTES = 64 << 20


class RangeWriter:
    """Collects ranges and writes them, all at once where that takes no copies."""

    def __init__(
        self,
        order: WorkOrder,
        planner: SavePlanner,
        backend: Backend,
        *,
        durable: bool,
        progress: Callable[[int, int], Any] | None,
    ) -> None:
        self._order = order
        self._planner = planner
        self._backend = backend
        self._durable = durable
        self._progress = progress
        self._gives_references = _gives_references(planner)
        self._written = Written(0, array("I", bytes(4 * order.num_ranges)))
        self._sources: list[torch.Tensor] = []
        self._strips: list[Strip] = []
        self._range_of: list[int] = []  #: strip -> range
        self._starts: dict[int, int] = {}  #: strip -> where in its record it begins, if that is in the first bytes
        self._copied_nbytes = 0

    def add(self, index: int, item: WriteItem) -> None:
        """Takes the range ``index`` of the order, which is of ``item``."""
        payload_offset, begin, end = self._order.ranges[3 * index : 3 * index + 3]
        tensor = resolved(self._planner, item)
        for part in contiguous_ranges(tensor, begin, end, _COPIES_NBYTES):
            copied = part.tensor.untyped_storage()._cdata != tensor.untyped_storage()._cdata
            if copied or not self._gives_references:
                self._copied_nbytes += part.tensor.numel() * part.tensor.itemsize
            self._add_strips(index, item, part, payload_offset)
            if self._copied_nbytes >= _COPIES_NBYTES:
                self._flush(durable=False)

    def finish(self, opaque: dict[str, bytes]) -> Written:
        """Writes what is left; with ``durable``, all of this rank's bytes are on the device after it."""
        self._flush(durable=self._durable)
        self._written.opaque = opaque
        return self._written

    def _add_strips(self, index: int, item: WriteItem, part: RangeInMemory, payload_offset: int) -> None:
        data = item.tensor_data
        assert data is not None
        itemsize = part.tensor.itemsize
        if not self._sources or self._sources[-1] is not part.tensor:
            self._sources.append(part.tensor)
        for strip in strips_of_range(
            data.size,
            data.chunk.offsets,
            data.chunk.sizes,
            itemsize,
            part.begin,
            part.end,
            source=len(self._sources) - 1,
            source_offset=(part.tensor.storage_offset() + part.first) * itemsize,
            payload_offset=payload_offset,
        ):
            if strip.file_offset - payload_offset < 8:
                self._starts[len(self._strips)] = strip.file_offset - payload_offset
            self._strips.append(strip)
            self._range_of.append(index)

    def _flush(self, *, durable: bool) -> None:
        if self._strips or (durable and self._written.nbytes):
            results = self._backend.write_strips(
                self._order.temporary,
                [tensor.untyped_storage() for tensor in self._sources],
                self._strips,
                durable=durable,
                compute_crc32=self._order.compute_crc32,
                progress=self._report if self._progress is not None else None,
            )
            for index, strip, (crc, _) in zip(self._range_of, self._strips, results, strict=True):
                self._written.crcs[index] ^= crc
                self._written.nbytes += strip.row_nbytes * strip.num_rows
            for at, begin in self._starts.items():
                for offset, data in starts_of(self._strips[at], begin, results[at][1]):
                    self._written.starts.append((self._range_of[at], offset, data))
        self._sources, self._strips, self._range_of, self._starts = [], [], [], {}
        self._copied_nbytes = 0

    def _report(self, bytes_done: int, bytes_total: int) -> None:
        del bytes_total  # of this flush
        assert self._progress is not None
        self._progress(self._written.nbytes + bytes_done, self._order.nbytes)


def resolved(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    """The item's tensor, as the planner has promised it.

    Raises:
        ValueError: it is another.
    """
    data = item.tensor_data
    assert data is not None
    tensor = planner.resolve_data(item).detach()
    if tensor.shape != data.chunk.sizes or tensor.dtype != data.properties.dtype:
        raise ValueError(
            f"{item.index.fqn!r}: the planner promised {data.properties.dtype} {list(data.chunk.sizes)} and gave "
            f"{tensor.dtype} {list(tensor.shape)}"
        )
    if tensor.device.type == "meta":
        raise ValueError(f"{item.index.fqn!r} is a meta tensor: there is nothing to write")
    return tensor.resolve_conj().resolve_neg()


def starts_of(strip: Strip, begin: int, first_bytes: bytes) -> Iterator[tuple[int, bytes]]:
    """The serialization id depends on a record's first eight bytes, if they look like a data descriptor's: (offset in
    the record, bytes) of those in a strip that do.

    Args:
        begin: of the strip, in the record.
        first_bytes: of the strip, eight at most.
    """
    for row in range(strip.num_rows):
        offset = begin + row * strip.file_pitch
        if offset >= 8:
            break
        nbytes = min(strip.row_nbytes, 8 - offset)
        data, first_bytes = first_bytes[:nbytes], first_bytes[nbytes:]
        signature = DESCRIPTOR_SIGNATURE[offset : offset + nbytes]
        if data[: len(signature)] == signature:
            yield offset, data


class RangeInMemory(NamedTuple):
    """Elements ``begin`` to ``end`` of a shard, one after the other from element ``first`` of ``tensor`` on."""

    tensor: torch.Tensor
    first: int
    begin: int
    end: int


def contiguous_ranges(tensor: torch.Tensor, begin: int, end: int, limit_nbytes: int) -> Iterator[RangeInMemory]:
    """A range of ``tensor``'s elements in row-major order; where it is not contiguous, in copies of about
    ``limit_nbytes`` at most, made as they are asked for."""
    if tensor.is_contiguous():
        yield RangeInMemory(tensor, begin, begin, end)
        return
    if tensor.numel() * tensor.itemsize <= limit_nbytes:
        yield RangeInMemory(tensor.contiguous(), begin, begin, end)
        return
    inner = tensor.numel() // tensor.shape[0]
    step = max(limit_nbytes // (inner * tensor.itemsize), 1)
    for index in range(begin // inner, -(-end // inner), step):
        start = index * inner
        rows = tensor[index] if step == 1 else tensor[index : index + step]
        for part in contiguous_ranges(rows, max(begin - start, 0), min(end - start, rows.numel()), limit_nbytes):
            yield part._replace(begin=part.begin + start, end=part.end + start)


def _gives_references(planner: SavePlanner) -> bool:
    """Whether the planner's tensors are the state's own, so that all may be held at once."""
    kind = type(planner)
    names = ("resolve_data", "lookup_object", "transform_object")
    return all(getattr(kind, name, None) is getattr(DefaultSavePlanner, name) for name in names)
