"""A checkpoint directory of ``torch.distributed.checkpoint``: which tensors and values are in it, and the archives of
``torch.save`` that its parts are, which lie one behind the other in a file of each rank.

Needs no process group, and nothing of DCP but the classes of its metadata.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from ..errors import StateDictIOError, corrupt
from ..names.nested_state import nested
from ..progress import ProgressCallback, over_parts
from ..remote.urls import is_url
from ..untrusted.limits import SPARE_NBYTES, shown
from . import dcp_metadata
from .opened_bytes import OpenedBytes, PartOfBytes, open_bytes

_MAX_OPEN = 64  # files
_MAX_COMPARED = 10_000_000  # pairs of parts


class Part(NamedTuple):
    """Of a tensor, or all of a value that is none."""

    name: str  #: of the tensor or value
    offsets: tuple[int, ...]  #: in elements, of its first one in the tensor
    sizes: tuple[int, ...]
    file: str  #: in the directory
    offset: int  #: in bytes, of its archive in that file
    nbytes: int  #: of the archive

    @property
    def whole(self) -> str:
        at = f" at {list(self.offsets)}" if any(self.offsets) else ""
        return f"{shown(self.name)}{at}"


class StoredTensor(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size
    parts: list[Part]  #: that make it up, without overlap

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _OpenFile:
    """Closed when nobody refers to it any more: what reads a part holds it."""

    def __init__(self, path: str, backend: str) -> None:
        self._exit = contextlib.ExitStack()
        self.opened = self._exit.enter_context(open_bytes(path, backend, random_access=True))

    def __del__(self) -> None:
        if hasattr(self, "_exit"):
            self._exit.close()


class _OpenPart(PartOfBytes):
    def __init__(self, file: _OpenFile, part: Part, name: str) -> None:
        super().__init__(file.opened, part.offset, part.nbytes, name)
        self._file = file  # stays open as long as this


class DCPFolder:
    """May be used from several threads.

    Args:
        opened: its ``.metadata``.
        path: of that, as it was opened.
        weights_only: unpickle only DCP's own classes.

    Raises:
        CorruptCheckpointError, pickle.UnpicklingError: as :func:`.dcp_metadata.parse`; or the parts of a tensor do not
            make it up.
        StateDictIOError: it has parts that are compressed or encrypted.
    """

    def __init__(self, opened: OpenedBytes, path: str, backend: str, *, weights_only: bool) -> None:
        self.path = path
        self._folder = path[: path.rfind("/") + 1] if is_url(path) else os.path.dirname(path)
        self._backend = backend
        self._lock = threading.Lock()
        self._files: collections.OrderedDict[str, _OpenFile] = collections.OrderedDict()
        self._is_closed = False
        metadata = dcp_metadata.parse(opened.read_at(0, opened.nbytes), path, weights_only=weights_only)
        self.paths: dict[str, tuple[Any, ...]] = metadata.planner_data if type(metadata.planner_data) is dict else {}
        stored: dict[MetadataIndex, Any] = metadata.storage_data
        #: by flat name, in order: None for a value that is no tensor
        self.entries: dict[str, StoredTensor | None] = {}
        self._values: dict[str, Part] = {}
        for name, found in metadata.state_dict_metadata.items():
            if type(found) is TensorStorageMetadata:
                self.entries[name] = self._tensor(name, found, stored)
            else:
                info = stored.get(MetadataIndex(name))
                if info is None:
                    raise corrupt(path, f"{shown(name)!r} is nowhere")
                self.entries[name] = None
                self._values[name] = self._part(name, (), (), info)
        self.nbytes = opened.nbytes + sum(part.nbytes for part in self.parts())

    def _tensor(self, name: str, found: TensorStorageMetadata, stored: dict[MetadataIndex, Any]) -> StoredTensor:
        shape = tuple(found.size)
        parts = [
            self._part(name, tuple(chunk.offsets), tuple(chunk.sizes), stored[MetadataIndex(name, chunk.offsets)])
            for chunk in found.chunks
        ]
        if not _make_up(shape, parts):
            raise corrupt(self.path, f"the parts of {shown(name)!r} do not make up a tensor of {list(shape)}")
        return StoredTensor(found.properties.dtype, torch.Size(shape), parts)

    def _part(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], info: Any) -> Part:
        if transforms := getattr(info, "transform_descriptors", None):
            raise StateDictIOError(
                f"{self.path}: {shown(name)!r} is stored through {', '.join(map(str, transforms))}; load it with "
                "torch.distributed.checkpoint.load"
            )
        if not (type(info.offset) is int and type(info.length) is int and info.offset >= 0 and info.length >= 0):
            raise corrupt(self.path, f"a part of {shown(name)!r} has an invalid place")
        return Part(name, offsets, sizes, info.relative_path, info.offset, info.length)

    def parts(self) -> Iterator[Part]:
        """All, in order."""
        for name, tensor in self.entries.items():
            yield from [self._values[name]] if tensor is None else tensor.parts

    def tensor(self, name: str) -> StoredTensor:
        found = self.entries[name]
        assert found is not None, "no tensor"
        return found

    def value(self, name: str) -> Part:
        return self._values[name]

    def path_of(self, part: Part) -> str:
        return f"{self._folder}{part.file}" if is_url(self._folder) else os.path.join(self._folder, part.file)

    def open(self, part: Part) -> PartOfBytes:
        """Its archive.

        Raises:
            OSError: the file cannot be opened.
            CorruptCheckpointError: it ends before the part does.
        """
        path = self.path_of(part)
        with self._lock:
            if self._is_closed:
                raise ValueError(f"{self.path}: the checkpoint is closed")
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _OpenFile(path, self._backend)
                if len(self._files) > _MAX_OPEN:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
        if part.offset + part.nbytes > file.opened.nbytes:
            raise corrupt(path, f"it ends before {part.whole}, which {self.path} says is in it")
        return _OpenPart(file, part, f"{path} ({part.whole})")

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._files.clear()

    def nested(self, values: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        """The state, of (flat name, value).

        Raises:
            StateDictIOError: two would be in one place.
        """
        try:
            return nested(values, self.paths)
        except StateDictIOError as e:
            raise StateDictIOError(f"{self.path}: {e}") from None

    def check_fits(self) -> None:
        """Raises where the tensors have more bytes than the parts that they are made of, because some share theirs."""
        total = sum(tensor.nbytes for tensor in self.entries.values() if tensor is not None)
        ends: dict[str, int] = {}
        for part in self.parts():
            ends[part.file] = max(ends.get(part.file, 0), part.offset + part.nbytes)
        if total > sum(ends.values()) + SPARE_NBYTES:
            raise corrupt(self.path, f"its tensors have {total} bytes, many more than its files")


def _make_up(shape: tuple[int, ...], parts: Sequence[Part]) -> bool:
    """Whether each element of a tensor is in one part."""
    if not all(type(size) is int and size >= 0 for size in shape):
        return False
    boxes = [part for part in parts if math.prod(part.sizes)]
    for part in parts:
        if not len(part.offsets) == len(part.sizes) == len(shape):
            return False
        if not all(0 <= at <= at + n <= size for at, n, size in zip(part.offsets, part.sizes, shape, strict=True)):
            return False
    if sum(math.prod(part.sizes) for part in boxes) != math.prod(shape):
        return False
    if len(boxes) < 2:
        return True
    axis = max(range(len(shape)), key=lambda dim: len({part.offsets[dim] for part in boxes}))
    begun: list[Part] = []
    compared = 0
    for part in sorted(boxes, key=lambda part: part.offsets[axis]):
        begun = [other for other in begun if other.offsets[axis] + other.sizes[axis] > part.offsets[axis]]
        compared += len(begun)
        if compared > _MAX_COMPARED or any(_overlap(part, other) for other in begun):
            return False
        begun.append(part)
    return True


def _overlap(a: Part, b: Part) -> bool:
    return all(
        at < other_at + other_n and other_at < at + n
        for at, n, other_at, other_n in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    )


def load_folder(
    folder: DCPFolder,
    load_part: Callable[..., Any],
    progress: ProgressCallback | None,
) -> dict[str, Any]:
    """The state that was saved, nested as it was.

    Args:
        load_part: loads an archive: (part of bytes, progress=callback).

    Raises:
        CorruptCheckpointError: a part is not what the metadata says.
        Exception: what ``load_part`` raises.
    """
    folder.check_fits()
    parts = [*folder.parts()]
    reports = dict(zip(parts, over_parts(progress, [part.nbytes for part in parts]), strict=True))

    def loaded(part: Part) -> Any:
        return load_part(folder.open(part), progress=reports[part])

    def tensor(stored: StoredTensor) -> torch.Tensor:
        whole: torch.Tensor | None = None
        for part in stored.parts:
            piece = loaded(part)
            check_piece(folder, part, piece, stored.dtype)
            if len(stored.parts) == 1:
                whole = piece.detach()  # what is gathered is nobody's leaf
                break
            if whole is None:
                whole = torch.empty(stored.shape, dtype=stored.dtype, device=piece.device)
            narrowed(whole, part.offsets, part.sizes).copy_(piece.detach())
        if whole is None:
            whole = torch.empty(stored.shape, dtype=stored.dtype)
        return whole

    return folder.nested(
        [
            (name, loaded(folder.value(name)) if stored is None else tensor(stored))
            for name, stored in folder.entries.items()
        ]
    )


def check_piece(folder: DCPFolder, part: Part, piece: Any, dtype: torch.dtype) -> None:
    """
    Raises:
        CorruptCheckpointError: what a part holds is not what the metadata says.
    """
    if not (isinstance(piece, torch.Tensor) and piece.dtype == dtype and tuple(piece.shape) == part.sizes):
        what = f"{piece.dtype} {list(piece.shape)}" if isinstance(piece, torch.Tensor) else type(piece).__name__
        raise corrupt(folder.path_of(part), f"{part.whole} is {what}; {folder.path} says {dtype} {list(part.sizes)}")


def narrowed(tensor: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor
