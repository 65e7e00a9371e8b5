"""``SingleFileReader``: every rank reads its part of one file."""

from __future__ import annotations

import os
import uuid
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from .boxes import rows_of_strided
from .source import FileSource

_STAGING_NBYTES = 16 << 20


class SingleFileReader(StorageReader):  # type: ignore[misc]
    """Gives ``dcp.load`` any file of :func:`torch.save`: each rank reads the bytes that its shards need, into place,
    whatever the sharding. The file needs to know nothing of it.

    Args:
        path: of the file, visible to all ranks.
        weights_only: unpickle with torch's restricted unpickler: the security boundary. Use ``False`` only for what you
            trust.
        backend: ``"auto"``, ``"native"`` or ``"torch"``, as for :func:`statedict_io.load`.

    Attributes:
        bytes_read: that this rank read from the file in the last load: data, structure and directory.

    Values that are not plain tensors are handed out as DCP expects them. Use one reader for one load at a time.
    """

    def __init__(self, path: str | os.PathLike[str], *, weights_only: bool = True, backend: str = "auto") -> None:
        super().__init__()
        self.path = os.fspath(path)
        self.weights_only = weights_only
        self.backend = backend
        self.bytes_read = 0
        self._source: FileSource | None = None
        self._load_id = str(uuid.uuid4())

    @property
    def checkpoint_id(self) -> str:
        return self.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._close()
        if checkpoint_id:
            self.path = os.fspath(checkpoint_id)
        self._load_id = str(uuid.uuid4())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return os.path.isfile(checkpoint_id)

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """What is in the file: each tensor as one chunk, from which DCP cuts what each rank needs."""
        self._close()
        self.bytes_read = 0
        self._source = FileSource(self.path, weights_only=self.weights_only, backend=self.backend)
        state: dict[str, STORAGE_TYPES] = {}
        for name, value in self._source.values.items():
            state[name] = _tensor_metadata(value) if self._source.is_plain(value) else BytesStorageMetadata()
        meta = StorageMeta(checkpoint_id=self.path, load_id=self._load_id)
        return Metadata(state, planner_data=self._source.paths, storage_meta=meta)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        source = self._source
        if source is None:
            raise RuntimeError("read_data comes after read_metadata")
        try:
            for item in plan.items:
                value = source.values[item.storage_index.fqn]
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, source.opaque(value))
                else:
                    _read_tensor(source, value, item, planner)
        finally:
            self.bytes_read = source.bytes_read
            self._close()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _close(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def __del__(self) -> None:
        if getattr(self, "_source", None) is not None:
            self._close()


def _tensor_metadata(tensor: torch.Tensor) -> TensorStorageMetadata:
    properties = TensorProperties(dtype=tensor.dtype, requires_grad=tensor.requires_grad)
    whole = ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.size())
    return TensorStorageMetadata(properties, tensor.size(), [whole])


def _read_tensor(source: FileSource, value: torch.Tensor, item: ReadItem, planner: LoadPlanner) -> None:
    view = value.detach()
    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        view = view.narrow(dim, offset, length)
    target = planner.resolve_tensor(item).detach()
    if target.size() != view.size():
        raise ValueError(
            f"{item.storage_index.fqn!r}: the planner asks for {list(view.size())} into {list(target.size())}"
        )
    read_view(source, view, target)
    planner.commit_tensor(item, target)


def read_view(source: FileSource, view: torch.Tensor, target: torch.Tensor) -> None:
    """Fills ``target`` with what ``view``, a meta tensor of the file, stands for."""
    if view.numel() == 0:
        return
    # In the order of the file; a dimension without a stride is read once.
    order = sorted(range(view.dim()), key=lambda dim: -view.stride(dim))
    view, target = view.permute(order), target.permute(order)
    expanded = tuple(slice(0, 1) if view.stride(dim) == 0 else slice(None) for dim in range(view.dim()))
    view = view[expanded]
    in_place = (
        target.device.type == "cpu"
        and target.dtype == view.dtype
        and target.size() == view.size()
        and target.is_contiguous()
        and not target.is_conj()
        and not target.is_neg()
    )
    if in_place:
        _read_contiguous(source, view, target)
        return
    nbytes = view.numel() * view.itemsize
    if nbytes > _STAGING_NBYTES and view.dim():
        dim = max(range(view.dim()), key=lambda d: (view.size(d) > 1, -d))
        half = view.size(dim) // 2
        for start, length in ((0, half), (half, view.size(dim) - half)):
            narrowed = target.narrow(dim, start, length) if target.size(dim) == view.size(dim) else target
            read_view(source, view.narrow(dim, start, length), narrowed)
        return
    staging = torch.empty(view.size(), dtype=view.dtype, device="cpu")
    _read_contiguous(source, view, staging)
    target.copy_(staging)


def _read_contiguous(source: FileSource, view: torch.Tensor, target: torch.Tensor) -> None:
    itemsize = view.itemsize
    rows = list(rows_of_strided(view.size(), view.stride(), itemsize, view.storage_offset() * itemsize))
    source.read_rows(view, rows, target.untyped_storage(), target.storage_offset() * itemsize)
