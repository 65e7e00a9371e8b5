"""The backend without compiled code: pure Python over torch. Same bytes, same promises.

zlib releases the GIL, so a large payload is checksummed beside its writing; everything else is one thread's work. Of a
durable save the device writes while the rest comes.

It writes the archive itself (archive/layout): ``torch._C.PyTorchFileWriter`` takes the archive's name from the path
that it opens, so that a temporary would change the bytes, opens without ``O_EXCL``, and loses ``errno``.
"""

from __future__ import annotations

import ctypes
import mmap
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..archive.layout import ArchiveLayout
from ..archive.serialization_id import SerializationId
from ..pickles.lean_pickle import LeanPickle
from ..progress import ProgressCallback
from ..system.descriptors import sync, write_all_at
from ..system.file_digest import FileDigest
from ..system.pacing import WritePace
from . import arenas
from . import strips as strips_module
from .payloads import CHUNK_NBYTES, SMALL_NBYTES, Chunk, StorageBytes, Value, nbytes_of, payload_of
from .protocol import Records, StorageRange, Strip
from .python_reading import FileSource, PythonOpenArchive

if TYPE_CHECKING:
    from ..archive.payload_ranges import RangeEntries

_FLUSH_NBYTES = 16 << 20  # the device is kept busy while the rest is written


class PythonFile:
    """See :class:`~statedict_io.backends.protocol.PlannedFile`: ``values`` one behind the other."""

    in_any_order = True  # over holes

    def __init__(self, values: list[Value]) -> None:
        self._values = values
        self.nbytes = sum(map(nbytes_of, values))

    def write_fd(
        self,
        fd: int,
        *,
        durable: bool,
        progress: ProgressCallback | None,
        bytes_per_second: float | None = None,
        digest: FileDigest | None = None,
    ) -> None:
        strips_module.preallocate(fd, self.nbytes)
        pace = WritePace(bytes_per_second)
        offset = flushed = 0
        for chunk in self._chunks(progress, calls_back=progress is not None):
            if isinstance(chunk, int):
                offset += chunk
                if digest is not None:
                    digest.update_zeros(chunk)
                continue
            if digest is not None:
                digest.update(chunk)
            pace.wait_for(len(chunk))
            write_all_at(fd, chunk, offset)
            offset += len(chunk)
            if durable and offset - flushed >= _FLUSH_NBYTES:
                strips_module.start_flushing(fd, flushed, offset - flushed)
                flushed = offset
        strips_module.set_nbytes(fd, self.nbytes)

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        for chunk in self._chunks(progress, calls_back=True):
            if isinstance(chunk, int):
                chunk = bytes(chunk)
            write(memoryview(chunk))

    @property
    def device_nbytes(self) -> dict[str, int]:
        return {}  # what is on a device comes to the host by torch's own copy

    def snapshot_nbytes(self, *, on_devices: bool) -> int:
        del on_devices
        on_host = arenas.arena_nbytes(sum(value.nbytes() for _, value in self._storages_on_host()))
        return on_host + sum(nbytes_of(value) for value in self._values if _is_on_device(value))

    def snapshot(self, *, on_devices: bool, max_nbytes: int) -> PythonSnapshot:
        del on_devices
        return PythonSnapshot(self, max_nbytes)

    def _storages_on_host(self) -> list[tuple[int, StorageBytes]]:
        """With the index of the part."""
        return [
            (i, value)
            for i, value in enumerate(self._values)
            if isinstance(value, StorageBytes) and not value.is_on_device
        ]

    def copy_storages(self, max_nbytes: int) -> mmap.mmap:
        """From now on refers to copies; those of storages in host memory lie in the result."""
        on_host = self._storages_on_host()
        arena = arenas.acquire(sum(value.nbytes() for _, value in on_host), max_nbytes)
        try:
            values = [*self._values]
            for i, value in enumerate(self._values):
                if isinstance(value, StorageBytes) and value.is_on_device:
                    values[i] = StorageBytes(value.name, value.storage.cpu(), value.offset, value.nbytes())
            start = ctypes.addressof(ctypes.c_char.from_buffer(arena))
            offset = 0
            pieces = []
            for i, value in on_host:
                nbytes = value.nbytes()
                pieces.append((start + offset, value.storage.data_ptr() + value.offset, nbytes))
                values[i] = memoryview(arena)[offset : offset + nbytes]
                offset += nbytes
            arenas.copy(pieces)
        except BaseException:
            arenas.release(arena)
            raise
        self._values = values
        return arena

    def _chunks(self, progress: ProgressCallback | None, *, calls_back: bool) -> Iterator[Chunk]:
        """The file from front to back, in parts that are worth a write each."""
        gathered = bytearray()  # headers, descriptors and small payloads
        for piece in self._pieces(progress, calls_back=calls_back):
            if isinstance(piece, int) or len(piece) >= SMALL_NBYTES:
                if gathered:
                    yield gathered
                    gathered = bytearray()
                yield piece
                continue
            gathered += piece
            if len(gathered) >= CHUNK_NBYTES:
                yield gathered
                gathered = bytearray()
        if gathered:
            yield gathered
        if progress is not None:
            progress(self.nbytes, self.nbytes)

    def _pieces(self, progress: ProgressCallback | None, *, calls_back: bool) -> Iterator[Chunk]:
        """The file from front to back, in parts as they come.

        ``calls_back``: as for :meth:`~statedict_io.backends.payloads.Payload.chunks`.
        """
        offset = 0
        for value in self._values:
            payload = payload_of(value, compute_crc32=False)
            yield from payload.chunks(self._reporting(progress, offset), calls_back=calls_back)
            offset += nbytes_of(value)

    def _reporting(self, progress: ProgressCallback | None, offset: int) -> Callable[[int], None] | None:
        """``progress`` of the file, for a payload at ``offset``."""
        return None if progress is None else lambda done: progress(offset + done, self.nbytes)


class PythonPlannedArchive(PythonFile):
    """An archive of torch.save."""

    def __init__(self, archive_name: str, records: Records, *, alignment: int, compute_crc32: bool) -> None:
        storages: list[Value] = [
            storage.nbytes() if records.skip_data else _value_of(storage, f"record data/{key}")
            for key, storage in enumerate(records.table.storages)
        ]
        super().__init__([*(value for _, value in records.head), *storages, *(value for _, value in records.tail)])
        data = [f"data/{key}" for key in range(len(storages))]
        names = [*(name for name, _ in records.head), *data, *(name for name, _ in records.tail)]
        self._layout = ArchiveLayout(archive_name, [*zip(names, map(nbytes_of, self._values), strict=True)], alignment)
        self.nbytes = self._layout.nbytes
        self._compute_crc32 = compute_crc32

    def _pieces(self, progress: ProgressCallback | None, *, calls_back: bool) -> Iterator[Chunk]:
        """Record by record: header, payload, descriptor; then the directory."""
        crcs = []
        serialization_id = SerializationId()
        *records, last = self._layout.records
        for record, value in zip(records, self._values, strict=True):
            serialization_id.fold_write_start(f"{self._layout.archive_name}/{record.name}".encode())
            payload = payload_of(value, compute_crc32=self._compute_crc32)
            yield record.header
            yield from payload.chunks(self._reporting(progress, record.payload_offset), calls_back=calls_back)
            yield record.descriptor(payload.crc)
            serialization_id.fold_write_start(payload.start)
            if record.nbytes:
                serialization_id.fold_crc(payload.crc)
            crcs.append(payload.crc)
        digits = serialization_id.digits([record.name for record in records])
        crcs.append(zlib.crc32(digits) if self._compute_crc32 else 0)
        yield last.header + digits + last.descriptor(crcs[-1])
        yield self._layout.directory(crcs)


class PythonSnapshot:
    """See :class:`~statedict_io.backends.protocol.Snapshot`."""

    in_any_order = True

    def __init__(self, file: PythonFile, max_nbytes: int) -> None:
        self._file: PythonFile | None = file
        self._arena: mmap.mmap | None = None
        self._arena = file.copy_storages(max_nbytes)
        self.nbytes = file.nbytes

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def __del__(self) -> None:
        self.release()  # for a signal's exception that came up before anybody else could

    def release(self) -> None:
        self._file = None
        arena, self._arena = self._arena, None
        if arena is not None:
            arenas.release(arena)

    def write_fd(
        self,
        fd: int,
        *,
        durable: bool,
        progress: ProgressCallback | None,
        bytes_per_second: float | None = None,
        digest: FileDigest | None = None,
    ) -> None:
        assert self._file is not None
        self._file.write_fd(fd, durable=durable, progress=progress, bytes_per_second=bytes_per_second, digest=digest)

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        assert self._file is not None
        self._file.write_stream(write, progress=progress)


class PythonBackend:
    """See :class:`~statedict_io.backends.protocol.Backend`."""

    name = "python"

    def native_tables(self) -> None:
        return None

    def plan(self, archive_name: str, records: Records, *, alignment: int, compute_crc32: bool) -> PythonPlannedArchive:
        return PythonPlannedArchive(archive_name, records, alignment=alignment, compute_crc32=compute_crc32)

    def plan_gapless(self, parts: Sequence[bytes | StorageRange]) -> PythonFile:
        return PythonFile([part if isinstance(part, bytes) else StorageBytes(*part) for part in parts])

    def write_strips(
        self,
        path: str,
        storages: Sequence[torch.UntypedStorage],
        strips: Sequence[Strip],
        *,
        durable: bool,
        compute_crc32: bool,
        progress: ProgressCallback | None,
    ) -> list[tuple[int, bytes]]:
        with strips_module.open_existing(path) as fd:
            results = strips_module.write_strips(fd, storages, strips, compute_crc32=compute_crc32, progress=progress)
            if durable:
                sync(fd)
        return results

    def open_archive(self, fd: int, path: str) -> PythonOpenArchive:
        return PythonOpenArchive(FileSource(fd, path), path)

    def open_payloads(self, fd: int, path: str, payloads: RangeEntries) -> PythonOpenArchive:
        return PythonOpenArchive(FileSource(fd, path), path, payloads=payloads)

    def lean_pickle(self, data_pkl: bytes) -> LeanPickle:
        return LeanPickle.unchanged(data_pkl)  # to find out what could go takes Python as long as to do it

    def release_buffers(self) -> None:
        arenas.release_idle()

    def snapshot_memory_nbytes(self) -> int:
        return arenas.total_nbytes()


BACKEND = PythonBackend()


def _value_of(storage: Any, name: str) -> Value:
    """Of a storage, or of what stands for one that is not in memory."""
    return StorageBytes(name, storage) if isinstance(storage, torch.UntypedStorage) else storage


def _is_on_device(value: Value) -> bool:
    return isinstance(value, StorageBytes) and value.is_on_device
