"""The backend without compiled code: pure Python over torch. Same bytes, same promises.

zlib releases the GIL, so a large payload is checksummed beside its writing; everything else is one thread's work. Of a
durable save the device writes while the rest comes.

It writes the archive itself (archive/layout): ``torch._C.PyTorchFileWriter`` takes the archive's name from the path
that it opens, so that a temporary would change the bytes, opens without ``O_EXCL``, and loses ``errno``.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from ..archive.layout import ArchiveLayout
from ..archive.serialization_id import SerializationId
from ..pickles.lean_pickle import LeanPickle
from ..progress import ProgressCallback
from ..system.descriptors import sync, write_all_at
from ..system.pacing import WritePace
from . import arenas
from . import strips as strips_module
from .file_range import FileRange
from .protocol import Records, Strip
from .python_reader import FileSource, PythonReader, storage_memory

_CHUNK_NBYTES = 1 << 20
_GATHER_BELOW_NBYTES = 64 << 10
_FLUSH_NBYTES = 16 << 20  # the device is kept busy while the rest is written

#: a record's content; an int is the size of a hole
_Value: TypeAlias = "bytes | memoryview | torch.UntypedStorage | FileRange | int"


class PythonArchive:
    """See :class:`~statedict_io.backends.protocol.Archive`."""

    in_any_order = True  # over holes

    def __init__(self, archive_name: str, records: Records, *, alignment: int, compute_crc32: bool) -> None:
        data = [
            (f"data/{key}", storage.nbytes() if records.skip_data else storage)
            for key, storage in enumerate(records.table.storages)
        ]
        self._records: list[tuple[str, _Value]] = [*records.head, *data, *records.tail]
        sizes = [(record_name, _nbytes(value)) for record_name, value in self._records]
        self._layout = ArchiveLayout(archive_name, sizes, alignment)
        self._compute_crc32 = compute_crc32

    @property
    def nbytes(self) -> int:
        return self._layout.nbytes

    def write_fd(
        self, fd: int, *, durable: bool, progress: ProgressCallback | None, bytes_per_second: float | None = None
    ) -> None:
        strips_module.preallocate(fd, self.nbytes)
        pace = WritePace(bytes_per_second)
        offset = flushed = 0
        for chunk in self._chunks(progress, calls_back=progress is not None):
            if isinstance(chunk, int):
                offset += chunk
                continue
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
        on_host = arenas.arena_nbytes(sum(storage.nbytes() for _, storage in self._storages_on_host()))
        return on_host + sum(_nbytes(value) for _, value in self._records if _is_on_device(value))

    def snapshot(self, *, on_devices: bool, max_nbytes: int) -> PythonSnapshot:
        del on_devices
        return PythonSnapshot(self, max_nbytes)

    def _storages_on_host(self) -> list[tuple[int, torch.UntypedStorage]]:
        """With the index of the record."""
        return [
            (i, value)
            for i, (_, value) in enumerate(self._records)
            if isinstance(value, torch.UntypedStorage) and not _is_on_device(value)
        ]

    def copy_storages(self, max_nbytes: int) -> mmap.mmap:
        """From now on refers to copies; those of storages in host memory lie in the result."""
        on_host = self._storages_on_host()
        arena = arenas.acquire(sum(storage.nbytes() for _, storage in on_host), max_nbytes)
        try:
            records = [*self._records]
            for i, (record_name, value) in enumerate(self._records):
                if isinstance(value, torch.UntypedStorage) and _is_on_device(value):
                    records[i] = (record_name, value.cpu())
            start = ctypes.addressof(ctypes.c_char.from_buffer(arena))
            offset = 0
            pieces = []
            for i, storage in on_host:
                nbytes = storage.nbytes()
                pieces.append((start + offset, storage.data_ptr(), nbytes))
                records[i] = (records[i][0], memoryview(arena)[offset : offset + nbytes])
                offset += nbytes
            arenas.copy(pieces)
        except BaseException:
            arenas.release(arena)
            raise
        self._records = records
        return arena

    def _chunks(
        self, progress: ProgressCallback | None, *, calls_back: bool
    ) -> Iterator[bytes | bytearray | memoryview | int]:
        """The file from front to back; an int is a hole of that many bytes.

        ``calls_back``: a caller's code runs in ``progress`` or between two chunks.
        """
        crcs = []
        serialization_id = SerializationId()
        small = bytearray()  # headers, descriptors and small payloads, to be handed out together
        values = [value for _, value in self._records]
        for record, value in zip(self._layout.records, [*values, None], strict=True):
            if value is None:
                value = serialization_id.digits([r.name for r in self._layout.records[:-1]])
            else:
                serialization_id.fold_write_start(f"{self._layout.archive_name}/{record.name}".encode())
            small += record.header
            if isinstance(value, int):
                crc = 0
                yield small
                small = bytearray()
                yield value
            elif isinstance(value, FileRange):
                crc = 0
                done = 0
                yield small
                small = bytearray()
                for piece in value.pieces(_CHUNK_NBYTES):
                    if done == 0:
                        serialization_id.fold_write_start(piece)
                    if self._compute_crc32:
                        crc = zlib.crc32(piece, crc)
                    yield piece
                    done += len(piece)
                    if progress is not None:
                        progress(record.payload_offset + done, self.nbytes)
            else:
                payload = _Payload(value, record.name, record.nbytes)
                serialization_id.fold_write_start(payload.memory)
                if record.nbytes < _GATHER_BELOW_NBYTES:
                    small += payload.memory
                    crc = zlib.crc32(payload.memory) if self._compute_crc32 else 0
                else:
                    yield small
                    small = bytearray()
                    crc = 0
                    # A caller's code may free what a thread is reading.
                    checked_nbytes = _CHUNK_NBYTES if calls_back else record.nbytes
                    for start in range(0, record.nbytes, checked_nbytes):
                        piece = payload.memory[start : start + checked_nbytes]
                        crc_of_piece = self._start_crc(piece, crc)
                        try:
                            for at in range(0, len(piece), _CHUNK_NBYTES):
                                yield piece[at : at + _CHUNK_NBYTES]
                        finally:  # also when a write failed: no thread outlives the save
                            crc = crc_of_piece()
                        payload.check_unchanged()
                        if progress is not None:
                            progress(record.payload_offset + start + len(piece), self.nbytes)
                            payload.check_unchanged()
            crcs.append(crc)
            if record.nbytes:
                small += record.descriptor(crc)
                serialization_id.fold_crc(crc)
            if len(small) >= _CHUNK_NBYTES:
                yield small
                small = bytearray()
        yield small + self._layout.directory(crcs)
        if progress is not None:
            progress(self.nbytes, self.nbytes)

    def _start_crc(self, piece: memoryview, crc: int) -> Callable[[], int]:
        """Begins to extend ``crc`` by ``piece``, by a large one beside its writing; the result waits for it."""
        if not self._compute_crc32:
            return lambda: 0
        crcs: list[int] = []
        thread = threading.Thread(target=lambda: crcs.append(zlib.crc32(piece, crc)))
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter is exiting
            return lambda: zlib.crc32(piece, crc)

        def wait() -> int:
            thread.join()
            return crcs[0]

        return wait


class _Payload:
    """A record's bytes in host memory, for as long as nobody resizes or moves the storage that they are of."""

    def __init__(self, value: bytes | memoryview | torch.UntypedStorage, record: str, nbytes: int) -> None:
        self._record = record
        self._nbytes = nbytes
        self._storage: torch.UntypedStorage | None = None
        if isinstance(value, torch.UntypedStorage):
            self._storage = value if value.device.type == "cpu" else value.cpu()
            self.memory = storage_memory(self._storage)
            self._address = self._storage.data_ptr()
            self.check_unchanged()
        else:
            self.memory = memoryview(value)

    def check_unchanged(self) -> None:
        storage = self._storage
        if storage is not None and (storage.nbytes() != self._nbytes or storage.data_ptr() != self._address):
            raise RuntimeError(
                f"the storage of record {self._record} was resized or moved while it was being saved: "
                f"it had {self._nbytes} bytes, now it has {storage.nbytes()}"
            )


class PythonSnapshot:
    """See :class:`~statedict_io.backends.protocol.Snapshot`."""

    in_any_order = True

    def __init__(self, archive: PythonArchive, max_nbytes: int) -> None:
        self._archive: PythonArchive | None = archive
        self._arena: mmap.mmap | None = None
        self._arena = archive.copy_storages(max_nbytes)
        self.nbytes = archive.nbytes

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def __del__(self) -> None:
        self.release()  # for a signal's exception that came up before anybody else could

    def release(self) -> None:
        self._archive = None
        arena, self._arena = self._arena, None
        if arena is not None:
            arenas.release(arena)

    def write_fd(
        self, fd: int, *, durable: bool, progress: ProgressCallback | None, bytes_per_second: float | None = None
    ) -> None:
        assert self._archive is not None
        self._archive.write_fd(fd, durable=durable, progress=progress, bytes_per_second=bytes_per_second)

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        assert self._archive is not None
        self._archive.write_stream(write, progress=progress)


class PythonBackend:
    """See :class:`~statedict_io.backends.protocol.Backend`."""

    name = "python"

    def native_tables(self) -> None:
        return None

    def plan(self, archive_name: str, records: Records, *, alignment: int, compute_crc32: bool) -> PythonArchive:
        return PythonArchive(archive_name, records, alignment=alignment, compute_crc32=compute_crc32)

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

    def open_archive(self, fd: int, path: str) -> PythonReader:
        return PythonReader(FileSource(fd, path), path)

    def lean_pickle(self, data_pkl: bytes) -> LeanPickle:
        return LeanPickle.unchanged(data_pkl)  # to find out what could go takes Python as long as to do it

    def release_buffers(self) -> None:
        arenas.release_idle()

    def snapshot_memory_nbytes(self) -> int:
        return arenas.total_nbytes()


BACKEND = PythonBackend()


def _nbytes(value: _Value) -> int:
    if isinstance(value, int):
        return value
    return len(value) if isinstance(value, (bytes, memoryview)) else value.nbytes()


def _is_on_device(value: _Value) -> bool:
    return isinstance(value, torch.UntypedStorage) and value.device.type != "cpu"
