"""What a conversion did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Conversion:
    """What :func:`~statedict_io.conversion.convert` did."""

    num_tensors: int
    nbytes: int  #: of the tensors
    left_out: Sequence[str]  #: names of values that are no tensors, which safetensors cannot hold
    untied: list[str]  #: names of tensors that shared a record with one before, now written out
    metadata_left_out: list[str]  #: of a safetensors file; not "format", which says that torch wrote it
