"""A file of ``torch.save`` as DCP's loading sees it: what is in it, and byte ranges of it, counted."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .. import archives
from ..archives import DATA_PKL, Records
from ..backends.fallback_reader import storage_memory
from ..errors import StateDictIOError, corrupt
from ..installed import torch_save
from ..reading.refusals import refusal
from ..remote.stores import is_url, locate
from ..unpickling import ZipReader, can_rebind, swaps_bytes, torch_load
from .boxes import Rows
from .flat_state import flat_state

_NUM_THREADS = 4
_PIECE_NBYTES = 8 << 20


class FileSource:
    """An open file and its structure, in which meta tensors stand for those of the file. No payload is read.

    Use from one thread; :meth:`close` it.

    Args:
        path: of the file.
        weights_only: unpickle with torch's restricted unpickler.
        backend: that parses the directory.

    Raises:
        OSError, CorruptCheckpointError, StateDictIOError: the file cannot be read, is damaged, or holds no mapping.
        ValueError: a URL that is not this machine's.
        Exception: what ``torch.load`` raises for what it will not unpickle.
    """

    def __init__(self, path: str, *, weights_only: bool, backend: str) -> None:
        if is_url(path):
            place = locate(path)
            if place.local_path is None:
                raise ValueError(
                    f"{place.url}: ranks read rows of a file, not of an object in a store: copy it to a file system "
                    "that all ranks share, or load it with statedict_io.load"
                )
            path = place.local_path
        self.path = path
        self.bytes_read = 0
        self._resources = contextlib.ExitStack()
        self._storages: dict[int, tuple[str, torch.UntypedStorage]] = {}  #: address of a meta storage -> its record
        self._offsets: dict[str, int] = {}
        self._inflated: tuple[str, bytes] = ("", b"")
        try:
            self._records: Records = self._resources.enter_context(archives.opened(path, backend))
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._resources.callback(os.close, self._fd)
            self._pool = self._resources.enter_context(ThreadPoolExecutor(_NUM_THREADS))
            archives.check_kind(self._records)
            state = self._unpickle(weights_only)
        except BaseException:
            self.close()
            raise
        if not isinstance(state, Mapping):
            self.close()
            raise StateDictIOError(f"{path}: holds a {type(state).__name__}; DCP loads mappings of names to values")
        try:
            flat = flat_state(state)
        except StateDictIOError as e:
            self.close()
            raise StateDictIOError(f"{path}: {e}") from None
        #: as in FlatState
        self.values, self.paths, self.renamed = flat

    def close(self) -> None:
        self._resources.close()

    def is_plain(self, value: Any) -> bool:
        """Whether ``value`` is a tensor whose bytes lie in a record, element by element."""
        return (
            isinstance(value, torch.Tensor)
            and type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
            and value.layout == torch.strided
            and not value.is_quantized
            and not value.is_conj()
            and not value.is_neg()
            and value.untyped_storage()._cdata in self._storages
        )

    def record_of(self, tensor: torch.Tensor) -> str:
        """Where a plain tensor lies."""
        return self._storages[tensor.untyped_storage()._cdata][0]

    def read_rows(self, tensor: torch.Tensor, rows: list[Rows], destination: torch.UntypedStorage, offset: int) -> None:
        """Reads rows of the storage of a tensor of :attr:`values`, one after the other, into a CPU storage.

        Args:
            tensor: any view of it.
            rows: with offsets in its storage, bytes.
            destination: where to.
            offset: of the first byte there.
        """
        name, storage = self._storages[tensor.untyped_storage()._cdata]
        if any(row.end > storage.nbytes() or row.offset < 0 for row in rows):
            raise corrupt(self.path, f"a tensor reaches beyond its record {name!r}")
        entry = self._records.entry(name)
        memory = storage_memory(destination)
        if entry.compressed:
            self._copy_rows(name, rows, memory, offset)
            return
        start = self._payload_offset(name)
        pieces = []
        for row in rows:
            if row.num_rows == 1:
                for done in range(0, row.nbytes, _PIECE_NBYTES):
                    nbytes = min(_PIECE_NBYTES, row.nbytes - done)
                    pieces.append((start + row.offset + done, memory[offset + done : offset + done + nbytes], 1, 0))
            else:
                step = max(_PIECE_NBYTES // row.nbytes, 1)
                for first in range(0, row.num_rows, step):
                    count = min(step, row.num_rows - first)
                    at = offset + first * row.nbytes
                    into = memory[at : at + count * row.nbytes]
                    pieces.append((start + row.offset + first * row.pitch, into, count, row.pitch))
            offset += row.nbytes * row.num_rows
        if len(pieces) == 1:
            self._read_piece(pieces[0])
        else:
            list(self._pool.map(self._read_piece, pieces))
        self.bytes_read += sum(len(piece[1]) for piece in pieces)

    def opaque(self, value: Any) -> io.BytesIO:
        """What ``torch.save`` makes of ``value``, with the tensors in it read."""
        stream = io.BytesIO()
        torch_save(self._with_data(value), stream)
        stream.seek(0)
        return stream

    def _unpickle(self, weights_only: bool) -> Any:
        if not can_rebind():
            raise StateDictIOError(
                f"torch {torch.__version__} loads files in a way that SingleFileReader does not know; use torch.load"
            )
        records = self._records
        if swaps_bytes(records):
            raise StateDictIOError(
                f"{self.path}: was saved on a machine of the other byte order; torch.load converts it"
            )
        last = max(records.entries, key=lambda entry: entry.header_offset)
        self.bytes_read += os.fstat(self._fd).st_size - last.header_offset - last.stored_nbytes  # the directory
        self.bytes_read += records.entry(DATA_PKL).stored_nbytes if DATA_PKL in records else 0
        load = torch_load(lambda _: contextlib.nullcontext(ZipReader(records, self)))
        try:
            return load(self.path, map_location=lambda storage, _: storage, weights_only=weights_only)
        except pickle.UnpicklingError as e:
            if not weights_only:
                raise
            raise refusal(self.path, e, "pass weights_only=False (on the command line --trust)") from None

    def take(self, name: str, nbytes: int) -> torch.UntypedStorage:
        """For :class:`~statedict_io.unpickling.ZipReader`: a storage without data."""
        if self._records.entry(name).nbytes != nbytes:
            raise corrupt(
                self.path, f"record {name!r} has {self._records.entry(name).nbytes} bytes, its storage {nbytes}"
            )
        storage = torch.UntypedStorage(nbytes, device="meta")
        self._storages[storage._cdata] = (name, storage)
        return storage

    def _payload_offset(self, name: str) -> int:
        offset = self._offsets.get(name)
        if offset is None:
            offset = self._offsets[name] = self._records.payload_offset(name)
            self.bytes_read += 30 + len(name)
        return offset

    def _read_piece(self, piece: tuple[int, memoryview, int, int]) -> None:
        file_offset, into, count, pitch = piece
        nbytes = len(into) // count
        for row in range(count):
            self._read_into(into[row * nbytes : (row + 1) * nbytes], file_offset + row * pitch)

    def _read_into(self, into: memoryview, file_offset: int) -> None:
        try:
            while into:
                taken = os.preadv(self._fd, [into], file_offset)
                if taken == 0:
                    raise corrupt(self.path, "it was cut while it was read")
                into = into[taken:]
                file_offset += taken
        except OSError as e:
            e.filename = self.path
            raise

    def _copy_rows(self, name: str, rows: list[Rows], memory: memoryview, offset: int) -> None:
        if self._inflated[0] != name:
            self._inflated = (name, self._records.read(name))
            self.bytes_read += self._records.entry(name).stored_nbytes
        data = memoryview(self._inflated[1])
        for row in rows:
            for index in range(row.num_rows):
                start = row.offset + index * row.pitch
                memory[offset : offset + row.nbytes] = data[start : start + row.nbytes]
                offset += row.nbytes

    def _with_data(self, value: Any) -> Any:
        """``value`` with storages that have their data in place of the meta storages, wherever they are in it."""
        met: list[Any] = []

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: Any) -> int | None:
                if not isinstance(obj, torch.Tensor):
                    return None
                met.append(obj)
                return len(met) - 1

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, index: int) -> Any:
                return filled[index]

        stream = io.BytesIO()
        Pickler(stream).dump(value)
        if not met:
            return value
        filled = [self._filled(tensor) for tensor in met]
        stream.seek(0)
        return Unpickler(stream).load()

    def _filled(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.is_plain(tensor):
            raise StateDictIOError(
                f"{self.path}: holds a {type(tensor).__name__} of layout {tensor.layout}, which SingleFileReader "
                "cannot give out; load it with torch.load"
            )
        name, storage = self._storages[tensor.untyped_storage()._cdata]
        del name
        data = torch.UntypedStorage(storage.nbytes(), device="cpu")
        self.read_rows(tensor, [Rows(0, storage.nbytes(), 1, 0)] if storage.nbytes() else [], data, 0)
        filled = torch.empty(0, dtype=tensor.dtype, device="cpu")
        filled.set_(data, tensor.storage_offset(), tensor.size(), tensor.stride())
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(filled, requires_grad=tensor.requires_grad)
        return filled.requires_grad_(tensor.requires_grad)
