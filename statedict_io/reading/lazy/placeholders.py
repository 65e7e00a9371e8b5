"""What stands for storages while ``data.pkl`` is unpickled without their data."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ..records import StoredRecords

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


class PlaceholderFeed:
    """Storages without data, and the records that they stand for. A
    :class:`~statedict_io.pickles.persistent_ids.StorageFeed`."""

    def __init__(self, records: StoredRecords) -> None:
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

    def record_of(self, tensor: torch.Tensor) -> int | None:
        """The record in which all bytes of a plain tensor lie, element by element; None for other kinds."""
        if not is_plain(tensor):
            return None
        return self._indices.get(tensor.untyped_storage()._cdata)


class DataFeed:
    """Storages read when they are asked for, those of the records ``without_data`` excepted."""

    def __init__(self, records: StoredRecords, without_data: Collection[int | None] = ()) -> None:
        self._records = records
        self._without_data = without_data

    def take(self, name: str, nbytes: int) -> torch.UntypedStorage:
        index = self._records.sized(name, nbytes)
        if index in self._without_data:
            return torch.UntypedStorage(nbytes, device="meta")
        return self._records.archive.load_storages([index], verify=False, progress=None)[0]


def is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in _PLAIN_TYPES
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
    )


def is_saved_without_data(placeholder: torch.Tensor) -> bool:
    """Of a tensor for which :class:`PlaceholderFeed` knows no record: whether it was on the meta device when it was
    saved."""
    return placeholder.is_meta and is_plain(placeholder)


def lacks_data(tensor: torch.Tensor) -> bool:
    """Whether a storage of :class:`DataFeed` without data is in a tensor, in its parts or its attributes."""
    if tensor.is_meta:
        return True
    parts = [value for value in vars(tensor).values() if isinstance(value, torch.Tensor)]
    if tensor.layout == torch.sparse_coo:
        parts += [tensor._indices(), tensor._values()]
    elif tensor.layout != torch.strided:
        parts.append(tensor.values())
        is_by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        parts += (
            [tensor.crow_indices(), tensor.col_indices()]
            if is_by_row
            else [tensor.ccol_indices(), tensor.row_indices()]
        )
    return any(map(lacks_data, parts))
