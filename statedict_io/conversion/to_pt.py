"""From ``.safetensors`` to what ``torch.save`` would write; the tensors go from file to file."""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.serialization

from .. import backends
from ..backends import reproduction
from ..backends.file_range import FileRange
from ..backends.protocol import Content, PlannedArchive, Records
from ..errors import FileKindError, naming
from ..formats import kinds, safetensors_format
from ..installed import torch_format
from ..pickles.pickling import pickle_object
from ..progress import ProgressCallback
from ..system.descriptors import descriptor_of, read_at
from ..writing.places import write_content, write_file
from ..writing.stock_saves import StockZip
from ..writing.targets import FileTarget
from .outcome import Conversion


def to_pt(source: str, target: FileTarget, progress: ProgressCallback | None, atomic: bool) -> Conversion:
    with naming(source), descriptor_of(source, os.O_RDONLY) as fd:
        file_nbytes = os.fstat(fd).st_size
        _check_is_safetensors(read_at(fd, kinds.START_NBYTES, 0), source)
        tensors, metadata = safetensors_format.parse(
            lambda offset, nbytes: FileRange(fd, offset, nbytes, source).read(), file_nbytes, source
        )
        # Memory that is never touched: the pickler asks storages only for their sizes and addresses.
        memory = mmap.mmap(fd, file_nbytes, access=mmap.ACCESS_COPY)
        mapped = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        obj = {}
        ranges = {}
        for tensor in tensors:
            storage = mapped[tensor.begin : tensor.end]
            obj[tensor.name] = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(
                storage, 0, tensor.shape, _contiguous_strides(tensor.shape)
            )
            ranges[storage._cdata] = FileRange(fd, tensor.begin, tensor.nbytes, source)
        left_out = [key for key, value in metadata.items() if (key, value) != ("format", "pt")]
        if backends.choose("python") is None:
            content: Content = StockZip(obj, target.archive_name)
        else:
            content = _archive(obj, lambda storage: ranges[storage._cdata], target.archive_name)
        write_file(
            target,
            lambda file: write_content(content, file, durable=True, progress=progress),
            durable=True,
            atomic=atomic,
            for_torch=isinstance(content, StockZip),
        )
        return Conversion(len(tensors), sum(tensor.nbytes for tensor in tensors), [], [], left_out)


def _check_is_safetensors(start: bytes, source: str) -> None:
    if start.startswith(kinds.ZIP_START):
        raise FileKindError(f"{source}: is a zip archive, as torch.save writes them: give it a name that ends in .pt")
    kind = kinds.of_start(start, source)
    if kind not in (None, kinds.SAFETENSORS, kinds.UNKNOWN):
        raise FileKindError(f"{source}: {kind}")


def _archive(
    obj: dict[str, torch.Tensor], range_of: Callable[[torch.UntypedStorage], FileRange], archive_name: str
) -> PlannedArchive:
    pickled = pickle_object(obj, pickle, torch.serialization.DEFAULT_PROTOCOL)
    alignment = torch_format.storage_alignment()
    records = reproduction.records(pickled, alignment)
    return backends.python_backend().plan(
        archive_name,
        Records(records.head, _Ranges([range_of(s) for s in pickled.table.storages]), records.tail, False),
        alignment=alignment,
        compute_crc32=torch_format.compute_crc32(),
    )


class _Ranges:
    """A storage table whose storages lie in a file."""

    def __init__(self, storages: list[FileRange]) -> None:
        self.storages: list[Any] = storages

    def key_of(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> str:
        raise NotImplementedError


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
