"""From a checkpoint of any kind to what ``torch.save`` would write; the tensors go from file to file.

Of named tensors that is a dict of them, of an object what it was, with its storages on the CPU.
"""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.serialization

from .. import backends
from ..backends import reproduction
from ..backends.payloads import Value
from ..backends.protocol import PlannedFile, Records
from ..installed import torch_format
from ..pickles.pickling import pickle_object
from ..progress import ProgressCallback
from ..reading.lazy.checkpoint import Checkpoint
from ..reading.lazy.named_tensors import StoredObject
from ..reading.safetensors_payloads import on_storage
from ..system.file_digest import FileDigest
from ..untrusted.written_out import check_written_out, untied
from ..writing.saving import PlannedSave, write_planned
from ..writing.stock_saves import StockZip
from ..writing.targets import FileTarget, URLTarget
from .outcome import Conversion
from .streamed_tensor import StreamedTensor
from .to_safetensors import check_none_refused, shared_by

_PIECE_NBYTES = 8 << 20
_BLOCK_NBYTES = 256 << 20


def to_pt(
    checkpoint: Checkpoint,
    target: FileTarget | URLTarget,
    progress: ProgressCallback | None,
    atomic: bool,
    digest: FileDigest | None,
) -> Conversion:
    check_none_refused(checkpoint)
    checkpoint.check()
    stored = checkpoint.stored_object
    source = _NamedTensors(checkpoint) if stored is None else _Object(checkpoint, stored)
    if backends.choose("python") is None:
        content: PlannedFile | StockZip = StockZip(source.with_data(), target.archive_name)
    else:
        content = _archive(source, target.archive_name)
    write_planned(PlannedSave(target, content), durable=True, progress=progress, atomic=atomic, digest=digest)
    num_tensors = len(checkpoint)
    nbytes = sum(checkpoint.info(name).nbytes for name in checkpoint)
    left_out = [key for key, value in checkpoint.metadata.items() if (key, value) != ("format", "pt")]
    sums = {} if digest is None else {target.file_name: digest.hexdigest()}
    return Conversion(num_tensors, nbytes, source.left_out, source.untied, left_out, sums)


class _Source(Protocol):
    """What is converted."""

    obj: Any  #: of memory that has no data
    left_out: Sequence[str]
    untied: list[str]

    def payload_of(self, storage: torch.UntypedStorage) -> Value:
        """Of a storage in ``obj``."""

    def with_data(self) -> Any: ...


class _NamedTensors:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        infos = {name: checkpoint.info(name) for name in checkpoint}
        total = sum(info.nbytes for info in infos.values())
        check_written_out(checkpoint.path, total, checkpoint.nbytes)
        memory = _Untouched()
        self.obj = {}
        self._payloads: dict[int, StreamedTensor] = {}
        for name, info in infos.items():
            storage = memory.take(info.nbytes)
            self.obj[name] = on_storage(storage, info.dtype, tuple(info.shape))
            self._payloads[storage._cdata] = StreamedTensor(checkpoint, name, info.nbytes)
        self.left_out = checkpoint.others
        self.untied = untied(shared_by(checkpoint))

    def payload_of(self, storage: torch.UntypedStorage) -> Value:
        return self._payloads[storage._cdata]

    def with_data(self) -> Any:
        return dict(self._checkpoint)


class _Object:
    left_out: Sequence[str] = ()
    untied: list[str] = []  # noqa: RUF012  nothing is ever added

    def __init__(self, checkpoint: Checkpoint, stored: StoredObject) -> None:
        self._checkpoint = checkpoint
        self._stored = stored
        self._untouched = _Untouched()
        self._memory: dict[str, torch.UntypedStorage] = {}
        self._payloads: dict[int, _Record] = {}
        self.obj = stored.made_on(self._take)

    def _take(self, record: str, nbytes: int) -> torch.UntypedStorage:
        known = self._memory.get(record)
        if known is None:
            known = self._memory[record] = self._untouched.take(nbytes)
            self._payloads[known._cdata] = _Record(self._stored, record, nbytes)
        return known

    def payload_of(self, storage: torch.UntypedStorage) -> Value:
        # What was made with its data is its own.
        return self._payloads.get(storage._cdata, storage)

    def with_data(self) -> Any:
        def take(record: str, nbytes: int) -> torch.UntypedStorage:
            if record not in self._memory:
                whole = bytearray().join(map(bytes, self._stored.pieces(record, _PIECE_NBYTES)))
                self._memory[record] = (
                    torch.frombuffer(whole, dtype=torch.uint8).untyped_storage()
                    if whole
                    else (torch.UntypedStorage(0, device="cpu"))
                )
            return self._memory[record]

        self._memory.clear()
        return self._stored.made_on(take)


class _Untouched:
    """Memory that is never written to: the pickler asks storages only for their sizes and addresses."""

    def __init__(self) -> None:
        self._left = 0
        self._block = torch.UntypedStorage(0, device="cpu")

    def take(self, nbytes: int) -> torch.UntypedStorage:
        """A part that nobody else gets."""
        if nbytes > self._left:
            self._left = max(nbytes, _BLOCK_NBYTES)
            no_reserve = getattr(mmap, "MAP_NORESERVE", None)  # without backing, where the system has such a thing
            flags = [] if no_reserve is None else [mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve]
            self._block = torch.frombuffer(mmap.mmap(-1, self._left, *flags), dtype=torch.uint8).untyped_storage()
        begin = self._block.nbytes() - self._left
        self._left -= nbytes
        return self._block[begin : begin + nbytes]


class _Record:
    """A record of the source as one of the target."""

    def __init__(self, stored: StoredObject, record: str, nbytes: int) -> None:
        self._stored, self._record, self._nbytes = stored, record, nbytes

    def nbytes(self) -> int:
        return self._nbytes

    def pieces(self, piece_nbytes: int) -> Iterator[memoryview]:
        return self._stored.pieces(self._record, piece_nbytes)


def _archive(source: _Source, archive_name: str) -> PlannedFile:
    pickled = pickle_object(source.obj, pickle, torch.serialization.DEFAULT_PROTOCOL)
    alignment = torch_format.storage_alignment()
    records = reproduction.records(pickled, alignment)
    storages = [source.payload_of(storage) for storage in pickled.table.storages]
    return backends.python_backend().plan(
        archive_name,
        Records(records.head, _Payloads(storages), records.tail, False),
        alignment=alignment,
        compute_crc32=torch_format.compute_crc32(),
    )


class _Payloads:
    """A storage table whose storages lie in a file."""

    def __init__(self, storages: list[Value]) -> None:
        self.storages: list[Any] = storages

    def key_of(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> str:
        raise NotImplementedError
