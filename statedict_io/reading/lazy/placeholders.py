"""What stands for storages while ``data.pkl`` is unpickled without their data."""

from __future__ import annotations

import torch

from ...archives import Records

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


class PlaceholderFeed:
    """Storages without data, and the records that they stand for. A
    :class:`~statedict_io.reading.persistent_ids.StorageFeed`."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._indices: dict[int, int] = {}  # by address of the storage, which lives as long as this

    def take(self, name: str, nbytes: int) -> torch.UntypedStorage:
        known = self._storages.get(name)
        if known is not None and known.nbytes() == nbytes:
            return known
        index = self._records.sized(name, nbytes)
        storage = self._storages[name] = torch.UntypedStorage(nbytes, device="meta")
        self._indices[storage._cdata] = index
        return storage

    def __len__(self) -> int:
        """How many records are stood for."""
        return len(self._indices)

    def record_of(self, tensor: torch.Tensor) -> int | None:
        """The record in which all bytes of a plain tensor lie, element by element; None for other kinds."""
        if type(tensor) not in PLAIN_TYPES:
            return None
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            return None
        return self._indices.get(tensor.untyped_storage()._cdata)


class DataFeed:
    """Storages read when they are asked for, those of the records ``without_data`` excepted."""

    def __init__(self, records: Records, without_data: frozenset[int] = frozenset()) -> None:
        self._records = records
        self._without_data = without_data

    def take(self, name: str, nbytes: int) -> torch.UntypedStorage:
        index = self._records.sized(name, nbytes)
        if index in self._without_data:
            return torch.UntypedStorage(nbytes, device="meta")
        return self._records.archive.load_storages([index], verify=False, progress=None)[0]
