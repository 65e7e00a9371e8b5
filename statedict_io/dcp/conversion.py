"""DCP's checkpoint directories to files of ``torch.save``, and back, in one process and in bounded memory."""

from __future__ import annotations

import functools
import io
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, filesystem
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from ..installed.stock import torch_load
from ..pickles.refusals import refusal
from ..progress import Progress
from ..reading.dcp_metadata import CURE, DirectoryReader
from ..reading.verification import check_all
from ..untrusted.written_out import check_written_out, untied
from .directory_replacement import DirectoryReplacement
from .stored_state import StoredState
from .writer import SingleFileWriter

_CHUNK_NBYTES = 64 << 20


class DirectoryConversion(NamedTuple):
    """What :func:`file_to_dcp` could not keep as it was, by flat name."""

    renamed: list[str]  #: values below a mapping's key that was no string, as all keys are in such a directory
    untied: list[str]  #: tensors that shared a storage with one before, now written out


def dcp_to_file(
    directory: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    weights_only: bool = True,
    durable: bool = True,
    backend: str = "auto",
    progress: Progress = None,
    atomic: bool = True,
) -> None:
    """Writes what a checkpoint directory of ``dcp.save`` holds into a file that ``torch.load`` reads.

    Memory: some of the directory's largest shards.

    Args:
        directory: as given to ``dcp.save``.
        path: replaced atomically.
        weights_only: unpickle the directory's metadata and its values that are no tensors with torch's restricted
            unpickler, of the metadata DCP's own classes: the security boundary. Use ``False`` only for what you trust.
        durable, backend, progress, atomic: as for :class:`~statedict_io.dcp.SingleFileWriter`.

    Raises:
        OSError: what the system reported; the file at ``path`` is as it was, unless ``atomic=False``.
        pickle.UnpicklingError: something needs a class that is refused; names both.
        CorruptCheckpointError: the metadata is not sound.
        ValueError: shards that do not make up their tensor.
    """
    reader = DirectoryReader(os.fspath(directory), weights_only=weights_only)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    unpickle = functools.partial(_unpickled, os.fspath(directory), weights_only=weights_only)
    writer = _ConvertingWriter(path, unpickle, durable=durable, backend=backend, progress=progress, atomic=atomic)
    writer.set_up_storage_writer(is_coordinator=True)
    plan = SavePlan(_items_of(metadata), planner_data=metadata.planner_data)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(plan)])
    results = writer.write_data(plan, _FromDirectory(reader)).wait()
    writer.finish(metadata, [results])


def file_to_dcp(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    weights_only: bool = True,
    backend: str = "auto",
    atomic: bool = True,
) -> DirectoryConversion:
    """Writes what a file of ``torch.save`` holds into a checkpoint directory that ``dcp.load`` reads, tensors in chunks
    of at most 64 MiB.

    Memory: some chunks.

    Args:
        path: of the file.
        directory: made where it is missing. A checkpoint that is there is replaced as a whole: its ``.metadata`` is
            exchanged last, and its data files are removed then.
        weights_only: unpickle with torch's restricted unpickler: the security boundary.
        backend: that parses the file's directory.
        atomic: ``False`` writes into ``.metadata`` itself, for places that cannot replace it, as for
            :func:`statedict_io.save`.

    Raises:
        OSError, CorruptCheckpointError, StateDictIOError: the file cannot be read, is damaged, holds no mapping, or two
            paths in it would have one name. The directory is as it was, unless ``atomic=False``.
    """
    stored = StoredState(os.fspath(path), weights_only=weights_only, backend=backend, cure=CURE)
    try:
        check_all(stored.file.records)
        items = []
        nbytes = 0
        for name, value in stored.values.items():
            is_plain = stored.is_plain(value)
            nbytes += value.numel() * value.itemsize if is_plain else stored.opaque_nbytes(name)
            check_written_out(stored.file.path, nbytes, stored.file.nbytes)  # before anything is
            if is_plain:
                items += [_write_item(name, value, chunk) for chunk in _chunks(value)]
            else:
                items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
        (plan,), metadata = create_default_global_save_plan([SavePlan(items)])
        with DirectoryReplacement(os.fspath(directory), atomic=atomic) as replacement:
            writer = FileSystemWriter(os.fspath(directory))
            writer.set_up_storage_writer(is_coordinator=True)
            plan = replace(plan, storage_data=filesystem._StoragePrefix(replacement.prefix))
            results = writer.write_data(plan, _FromFile(stored)).wait()
            places = {result.index: result.storage_data for result in results}
            meta = writer.storage_meta()
            metadata = replace(metadata, planner_data=stored.paths, storage_data=places, storage_meta=meta)
            if hasattr(filesystem, "CURRENT_DCP_VERSION"):
                metadata.version = filesystem.CURRENT_DCP_VERSION
            replacement.commit(metadata)
        plain = [(name, value) for name, value in stored.values.items() if stored.is_plain(value)]
        shared = untied((name, stored.file.record_of(value)) for name, value in plain)
        return DirectoryConversion(stored.renamed, shared)
    finally:
        stored.close()


def _items_of(metadata: Metadata) -> list[WriteItem]:
    items = []
    for name, value in metadata.state_dict_metadata.items():
        if isinstance(value, TensorStorageMetadata):
            for place, chunk in enumerate(value.chunks):
                data = TensorWriteData(chunk, value.properties, value.size)
                items.append(WriteItem(MetadataIndex(name, chunk.offsets, place), WriteItemType.SHARD, None, data))
        else:
            items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
    return items


def _write_item(name: str, tensor: torch.Tensor, chunk: ChunkStorageMetadata) -> WriteItem:
    properties = TensorProperties(dtype=tensor.dtype, requires_grad=tensor.requires_grad)
    data = TensorWriteData(chunk, properties, tensor.size())
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, None, data)


def _chunks(tensor: torch.Tensor) -> list[ChunkStorageMetadata]:
    """Whole, or cut along the first dimension that is larger than one."""
    sizes = list(tensor.size())
    zeros = [0] * len(sizes)
    dim = next((dim for dim, size in enumerate(sizes) if size > 1), None)
    nbytes = tensor.numel() * tensor.itemsize
    if dim is None or nbytes <= _CHUNK_NBYTES:
        return [ChunkStorageMetadata(torch.Size(zeros), torch.Size(sizes))]
    step = max(_CHUNK_NBYTES // (nbytes // sizes[dim]), 1)
    return [
        ChunkStorageMetadata(
            torch.Size([*zeros[:dim], start, *zeros[dim + 1 :]]),
            torch.Size([*sizes[:dim], min(step, sizes[dim] - start), *sizes[dim + 1 :]]),
        )
        for start in range(0, sizes[dim], step)
    ]


class _LazyPlanner(SavePlanner):  # type: ignore[misc]
    """Has no state, only a way to get at each item of it."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise NotImplementedError


class _ConvertingWriter(SingleFileWriter):
    """``unpickle``: for values that are no tensors, which come from a file here."""

    _warns_of_refused = False  # what is refused raises here, unless the caller said that he trusts it

    def __init__(self, path: str | os.PathLike[str], unpickle: Callable[[str, bytes], Any], **options: Any) -> None:
        super().__init__(path, **options)
        self._unpickle = unpickle


def _unpickled(directory: str, name: str, data: bytes, *, weights_only: bool) -> Any:
    try:
        return torch_load(io.BytesIO(data), map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as e:
        raise refusal(f"{directory}: {name!r}", e, CURE) if weights_only else e from None


class _FromDirectory(_LazyPlanner):
    def __init__(self, reader: FileSystemReader) -> None:
        self._reader = reader

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        data = write_item.tensor_data
        index = write_item.index
        if data is None:
            planner: Any = _Catcher(None)
            empty = torch.Size((0,))
            item = ReadItem(LoadItemType.BYTE_IO, index, empty, index, empty, empty)
        else:
            planner = _Catcher(torch.empty(data.chunk.sizes, dtype=data.properties.dtype, device="cpu"))
            zeros = torch.Size([0] * len(data.chunk.sizes))
            item = ReadItem(LoadItemType.TENSOR, index, zeros, index, zeros, data.chunk.sizes)
        self._reader.read_data(LoadPlan([item]), planner).wait()
        return planner.caught


class _Catcher(DefaultLoadPlanner):  # type: ignore[misc]
    def __init__(self, target: torch.Tensor | None) -> None:
        super().__init__()
        self.caught: Any = target

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.caught = value

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.caught


class _FromFile(_LazyPlanner):
    def __init__(self, stored: StoredState) -> None:
        self._stored = stored

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        data = write_item.tensor_data
        if data is None:
            return self._stored.opaque(write_item.index.fqn)
        view = self._stored.values[write_item.index.fqn].detach()
        for dim, (offset, size) in enumerate(zip(data.chunk.offsets, data.chunk.sizes, strict=True)):
            view = view.narrow(dim, offset, size)
        tensor = torch.empty(view.size(), dtype=view.dtype, device="cpu")
        self._stored.file.read(view, tensor)
        return tensor
