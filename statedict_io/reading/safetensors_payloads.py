"""The tensors of a safetensors file as payloads, and what torch takes them for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..archive.payload_ranges import PayloadRange, RangeEntries
from ..formats import safetensors_parsed
from ..formats.safetensors_parsed import StoredTensor
from .opened_bytes import OpenedBytes
from .payloads import StoredPayloads, payloads_in


class SafetensorsPayloads(NamedTuple):
    """An open safetensors file."""

    tensors: Mapping[str, StoredTensor]  #: in the order of the file
    payloads: StoredPayloads  #: a tensor each, under its name
    metadata: dict[str, str]
    swaps: bool = sys.byteorder == "big"

    def like(self, name: str) -> torch.Tensor:
        """A tensor on the meta device with the dtype and shape of one; its storage stands for the payload.

        Raises:
            KeyError: there is none of that name.
            ValueError: this torch has no such tensors; says why.
        """
        tensor = self.tensors[name]
        dtype, shape = tensor.in_torch()
        storage = torch.UntypedStorage(tensor.nbytes, device="meta")
        return on_storage(storage, dtype, shape)


def on_storage(storage: torch.UntypedStorage, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The contiguous tensor that fills a storage."""
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    if 0 in shape:  # sizes beside a 0 may be such that no integer holds their product
        return tensor.set_(storage, 0, (0,), (1,)).reshape(shape)
    return tensor.set_(storage, 0, shape, torch.empty(shape, device="meta").stride())


def open_safetensors(opened: OpenedBytes) -> SafetensorsPayloads:
    """
    Raises:
        CorruptCheckpointError: the file is not sound.
        OSError: it cannot be read.
    """
    tensors, metadata = safetensors_parsed.parse(opened.read_at, opened.nbytes, opened.name)
    ranges = (PayloadRange(tensor.begin, tensor.nbytes, tensor.alignment) for tensor in tensors.values())
    payloads = payloads_in(opened, RangeEntries(ranges, [*tensors]))
    return SafetensorsPayloads(tensors, payloads, metadata)
