"""What a conversion did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Conversion:
    """What :func:`~statedict_io.conversion.convert` did."""

    num_tensors: int
    nbytes: int  #: of the tensors
    left_out: Sequence[str]  #: names of values that are no tensors, which safetensors cannot hold
    untied: list[str]  #: names of tensors that shared a record with one before, now written out
    metadata_left_out: list[str]  #: of a safetensors file; not "format", which says that torch wrote it
    sums: Mapping[str, str] = field(default_factory=dict)  #: SHA-256 in hex of each file, where they are wanted
