"""What the coordinator works out of all ranks' plans: the state's tensors, their order, and who writes which bytes of
which record. Holds no tensor and touches no file."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from .archive_frame import ArchiveFrame
from .assignment import Shard, assign_ranges
from .exchange import Address
from .structure import TensorEntry

# Their scales are not in the plan.
_QUANTIZED = {torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4}


@dataclass(frozen=True)
class LocalItems:
    """What a rank holds, before DCP drops the replicas; travels as ``SavePlan.storage_data``.

    The same objects as in ``SavePlan.items``: pickled with them, they cost some bytes each.
    """

    items: tuple[WriteItem, ...]
    address: Address | None = None  #: where other ranks reach this one, if they have to


class GlobalState:
    """The gathered state as the plans describe it.

    Args:
        plans: of all ranks, as the planner's ``create_global_plan`` leaves them, with :class:`LocalItems`.

    Raises:
        ValueError: shards that do not make up their tensor.
    """

    def __init__(self, plans: Sequence[SavePlan]) -> None:
        self.num_ranks = len(plans)
        self.paths: dict[str, tuple[Any, ...]] = {}
        for plan in plans:
            for name, path in (plan.planner_data or {}).items() if isinstance(plan.planner_data, dict) else ():
                self.paths.setdefault(name, path)
        self.tensors: dict[str, TensorEntry] = {}
        self.opaque: dict[str, tuple[int, WriteItem]] = {}  #: name -> who has it
        self._shards: dict[tuple[str, Any], _HeldShard] = {}
        for rank, plan in enumerate(plans):
            for item in plan.items:
                self._add(rank, item)
        for rank, plan in enumerate(plans):
            for item in plan.storage_data.items:
                if item.tensor_data is not None:
                    self._add_holder(rank, item)
        self._check_complete()

    @property
    def names(self) -> list[str]:
        """Flat names, in the order of the state: rank 0's, then those that only others have."""
        known = self.tensors.keys() | self.opaque.keys()
        names = [name for name in self.paths if name in known]
        return names + [name for name in [*self.tensors, *self.opaque] if name not in self.paths]

    def _add(self, rank: int, item: WriteItem) -> None:
        name = item.index.fqn
        if item.type == WriteItemType.BYTE_IO:
            self.opaque.setdefault(name, (rank, item))
            return
        data = item.tensor_data
        if data is None or data.chunk is None:
            raise ValueError(f"{name!r}: the plan has neither the tensor's size nor the shard's place")
        entry = self.tensors.get(name)
        if entry is None:
            _check_plain(name, data.properties)
            # What is gathered from shards is nobody's leaf.
            requires_grad = data.properties.requires_grad and item.type == WriteItemType.TENSOR
            self.tensors[name] = TensorEntry(data.size, data.properties.dtype, requires_grad=requires_grad)
        elif entry.shape != tuple(data.size) or entry.dtype != data.properties.dtype:
            raise ValueError(
                f"{name!r} is {entry.dtype} {list(entry.shape)} on one rank and {data.properties.dtype} "
                f"{list(data.size)} on rank {rank}"
            )
        shard = self._shards.get((name, data.chunk.offsets))
        if shard is None:
            shard = self._shards[name, data.chunk.offsets] = _HeldShard(data.chunk.sizes)
        elif shard.sizes != data.chunk.sizes:
            raise ValueError(f"{name!r}: overlapping shards at {list(data.chunk.offsets)}")
        shard.holders[rank] = item

    def _add_holder(self, rank: int, item: WriteItem) -> None:
        assert item.tensor_data is not None
        shard = self._shards.get((item.index.fqn, item.tensor_data.chunk.offsets))
        if shard is not None and shard.sizes == item.tensor_data.chunk.sizes:
            shard.holders[rank] = item

    def _check_complete(self) -> None:
        volumes = dict.fromkeys(self.tensors, 0)
        for (name, _), shard in self._shards.items():
            volumes[name] += math.prod(shard.sizes)
        for name, entry in self.tensors.items():
            if volumes[name] != math.prod(entry.shape):
                raise ValueError(
                    f"{name!r}: its shards have {volumes[name]} elements, the tensor {list(entry.shape)} has "
                    f"{math.prod(entry.shape)}; every rank that holds a shard has to take part in the save"
                )

    def assign(self, frame: ArchiveFrame) -> list[RankWork]:
        """Who writes what, one a rank. The entries must have their keys."""
        shards = []
        for (name, offsets), held in self._shards.items():
            entry = self.tensors[name]
            itemsize = entry.dtype.itemsize
            start = frame.storage(entry.key).payload_offset + _linear(entry.shape, offsets) * itemsize
            shards.append(Shard(math.prod(held.sizes), itemsize, start, tuple(sorted(held.holders))))
        work = [RankWork() for _ in range(self.num_ranks)]
        for rank, item in self.opaque.values():
            work[rank].add_opaque(item)
        for ((name, _), held), ranges in zip(self._shards.items(), assign_ranges(shards, self.num_ranks), strict=True):
            key = self.tensors[name].key
            for each in ranges:
                if each.end > each.begin:
                    payload_offset = frame.storage(key).payload_offset
                    work[each.rank].add(held.holders[each.rank], key, payload_offset, each.begin, each.end)
        return work


class _HeldShard:
    __slots__ = ("holders", "sizes")

    def __init__(self, sizes: torch.Size) -> None:
        self.sizes = sizes
        self.holders: dict[int, WriteItem] = {}  #: rank -> its item


class RankWork:
    """What one rank writes. ``ranges`` has (payload offset of the record, begin, end) for each tensor item, begin and
    end in elements of the item's shard; opaque items come first and have none."""

    def __init__(self) -> None:
        self.opaque: list[WriteItem] = []
        self.items: list[WriteItem] = []
        self.ranges = array("q")
        self.keys = array("q")  #: of the tensor items' records; the coordinator's to keep
        self.nbytes = 0  #: of the ranges

    def add_opaque(self, item: WriteItem) -> None:
        self.opaque.append(item)

    def add(self, item: WriteItem, key: int, payload_offset: int, begin: int, end: int) -> None:
        self.items.append(item)
        self.ranges.extend((payload_offset, begin, end))
        self.keys.append(key)
        assert item.tensor_data is not None
        self.nbytes += (end - begin) * item.tensor_data.properties.dtype.itemsize


def _check_plain(name: str, properties: Any) -> None:
    if properties.layout != torch.strided or properties.dtype in _QUANTIZED:
        what = properties.dtype if properties.layout == torch.strided else properties.layout
        raise ValueError(
            f"{name!r} is {what}: only plain, strided tensors have a place in a shared file; convert it first"
        )


def _linear(shape: Sequence[int], offsets: Sequence[int]) -> int:
    position = 0
    for size, offset in zip(shape, offsets, strict=True):
        position = position * size + offset
    return position
