"""``SingleFileReader``: every rank reads its part of one file."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import pickle
import uuid
from collections.abc import Iterable, Iterator, Sequence
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

from ..errors import StateDictIOError
from ..options import check_flags
from ..remote.urls import is_url
from . import agreement
from .stored_state import StoredState


class SingleFileReader(StorageReader):  # type: ignore[misc]
    """Gives ``dcp.load`` any file of :func:`torch.save`: each rank reads the bytes that its shards need, into place,
    however the state is sharded now, or was when it was saved.

    Args:
        path: of the file, visible to all ranks; or a URL of fsspec (``str``), of whose object each rank requests the
            ranges that it needs, many at one time.
        weights_only: unpickle with torch's restricted unpickler: the security boundary. A load that asks for a value
            that it refuses raises ``pickle.UnpicklingError``; one that does not ask for it works. Use ``False`` only
            for what you trust.
        backend: ``"auto"``, ``"native"`` or ``"python"``, as for :func:`statedict_io.load`.

    Attributes:
        bytes_read: that this rank read from the file in the last load: data, structure and directory.

    Values that are not plain tensors are handed out as DCP expects them. Use one reader for one load at a time.
    """

    def __init__(self, path: str | os.PathLike[str], *, weights_only: bool = True, backend: str = "auto") -> None:
        super().__init__()
        check_flags(weights_only=weights_only)
        self.path = os.fspath(path)
        self.weights_only = weights_only
        self.backend = backend
        self.bytes_read = 0
        self._state: StoredState | None = None
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
        return is_url(checkpoint_id) or os.path.isfile(checkpoint_id)

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """What is in the file: each tensor as one chunk, from which DCP cuts what each rank needs."""
        self._close()
        self.bytes_read = 0
        self._state = self._open(self.path)
        state: dict[str, STORAGE_TYPES] = {}
        for name, value in self._state.values.items():
            state[name] = _tensor_metadata(value) if self._state.is_plain(value) else BytesStorageMetadata()
        meta = StorageMeta(checkpoint_id=self.path, load_id=self._load_id)
        return Metadata(state, planner_data=self._state.paths, storage_meta=meta)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return dataclasses.replace(plan, storage_data=agreement.described(self._opened().file))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return agreement.with_choices(plans)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        choice = agreement.choice_of(plan)
        self._switch_to(choice, plan.items)
        stored = self._opened()
        try:
            for items in _gathered(stored, plan.items):
                _read_tensors(stored, items, planner)
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, stored.opaque(item.storage_index.fqn))
        finally:
            self.bytes_read = stored.file.bytes_read
            if not choice.keeps_open:  # others may still open it by this descriptor, until the call of DCP is over
                self._close()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _opened(self) -> StoredState:
        if self._state is None:
            raise RuntimeError("read_metadata comes first")
        return self._state

    def _open(self, path: str) -> StoredState:
        try:
            return StoredState(
                path,
                weights_only=self.weights_only,
                backend=self.backend,
                cure="read it with SingleFileReader(path, weights_only=False)",
                name=self.path,
            )
        except OSError:
            if not os.path.isdir(path):
                raise
            raise IsADirectoryError(
                errno.EISDIR, "SingleFileReader reads one file: name it. FileSystemReader reads directories", path
            ) from None

    def _switch_to(self, choice: agreement.Choice, items: list[ReadItem]) -> None:
        """Opens the version that all ranks read, where this one has opened another.

        Raises:
            StateDictIOError: it cannot be had any more, or is not what was planned for.
        """
        planned = self._opened()
        if planned.file.version == choice.version:
            return
        for way in choice.ways(self.path):
            with contextlib.suppress(OSError, StateDictIOError, pickle.UnpicklingError):
                found = self._open(way)
                if found.file.version == choice.version:
                    planned.close()
                    self._state = found
                    break
                found.close()
        else:
            raise StateDictIOError(
                f"{self.path}: it was replaced while the ranks opened it, and this rank cannot open the version that "
                "the others have read: load it again"
            )
        wrong = [item.storage_index.fqn for item in items if not found.has_like(planned, item.storage_index.fqn)]
        if wrong:
            raise StateDictIOError(
                f"{self.path}: it was replaced by a file of other tensors while the ranks opened it ({wrong[0]!r} "
                "differs): load it again"
            )

    def _close(self) -> None:
        stored, self._state = self._state, None
        if stored is not None:
            stored.close()

    def __del__(self) -> None:
        if getattr(self, "_state", None) is not None:
            self._close()


def _tensor_metadata(tensor: torch.Tensor) -> TensorStorageMetadata:
    properties = TensorProperties(dtype=tensor.dtype, requires_grad=tensor.requires_grad)
    whole = ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.size())
    return TensorStorageMetadata(properties, tensor.size(), [whole])


def _gathered(stored: StoredState, items: Iterable[ReadItem]) -> Iterator[list[ReadItem]]:
    """Those that are tensors, as many at a time as are worth being read together."""
    batch: list[ReadItem] = []
    nbytes = 0
    for item in items:
        if item.type == LoadItemType.BYTE_IO:
            continue
        batch.append(item)
        nbytes += math.prod(item.lengths) * stored.values[item.storage_index.fqn].element_size()
        if nbytes >= stored.file.gathered_nbytes:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _read_tensors(stored: StoredState, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
    pairs = [_view_and_target(stored, item, planner) for item in items]
    stored.file.read_all(pairs)
    for item, (_, target) in zip(items, pairs, strict=True):
        planner.commit_tensor(item, target)


def _view_and_target(stored: StoredState, item: ReadItem, planner: LoadPlanner) -> tuple[torch.Tensor, torch.Tensor]:
    view = stored.values[item.storage_index.fqn].detach()
    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        view = view.narrow(dim, offset, length)
    target = planner.resolve_tensor(item).detach()
    if target.size() != view.size():
        raise ValueError(
            f"{item.storage_index.fqn!r}: the planner asks for {list(view.size())} into {list(target.size())}"
        )
    return view, target
