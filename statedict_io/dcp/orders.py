"""What the coordinator and the ranks of a save tell each other, in DCP's messages."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field, replace
from typing import Any

from ..remote.multipart import SentPart
from .exchange import Address, Rows
from .own_parts import CRCPlace


@dataclass
class PartsOrder:
    """What the coordinator tells a rank about the object's parts."""

    rank: int  #: this one
    ticket: Any  #: of the upload; None where there is nothing to send
    cuts: array[int]  #: part ``n`` is from ``cuts[n - 1]`` to ``cuts[n]`` in the file
    owners: array[int]  #: rank that sends part 1, 2, ...
    known: dict[int, list[tuple[int, bytes]]]  #: as of :class:`~statedict_io.dcp.own_parts.OwnParts`
    crcs: dict[int, CRCPlace]
    senders: list[int]  #: other ranks of which this one needs something
    addresses: list[Address | None]  #: of all ranks
    token: bytes
    is_deputy: bool  #: discards what was sent where the coordinator is gone


@dataclass
class WorkOrder:
    """What the coordinator tells a rank; travels as ``SavePlan.storage_data``. The plan's last items are tensors, one a
    range; those before are opaque values."""

    path: str  #: of the target, as the caller of the coordinator gave it
    paths: list[str]  #: of what to write into; the first that this rank can reach. None where it is an object
    ranges: array[int]  #: (payload offset of the record, begin, end) of each tensor item, elements of its shard
    nbytes: int  #: of all ranges
    compute_crc32: bool
    key: str  #: of the coordinator's :class:`~statedict_io.dcp.shared_save.SharedSave`
    parts: PartsOrder | None = None  #: where the target is an object

    @property
    def temporary(self) -> str:
        return self.paths[0]

    def reachable(self) -> WorkOrder:
        """With the one path that works here."""
        if not self.paths:
            return self
        return replace(self, paths=[next((path for path in self.paths if os.path.exists(path)), self.paths[0])])

    @property
    def num_ranges(self) -> int:
        return len(self.ranges) // 3


@dataclass
class Written:
    """What a rank tells the coordinator; travels as ``WriteResult.storage_data``."""

    nbytes: int
    crcs: array[int]  #: what each range adds to the CRC of its record
    #: (range, offset, bytes) where a record's first eight bytes may look like a data descriptor's
    starts: list[tuple[int, int, bytes]] = field(default_factory=list)
    opaque: dict[str, bytes] = field(default_factory=dict)  #: name -> what ``torch.save`` makes of the value
    parts: list[SentPart] = field(default_factory=list)  #: that this rank has sent
    #: of an object too small for parts: rows, of the file as if it were one part, and their bytes
    rows: list[tuple[Rows, bytes]] = field(default_factory=list)
