"""The backend without compiled code: pure Python over torch. Same bytes, same promises.

zlib releases the GIL, so a large payload is checksummed beside its writing; everything else is one thread's work.
"""

from __future__ import annotations

import errno
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from ..progress import ProgressCallback
from . import strips as strips_module
from .archive import ArchiveLayout, SerializationId
from .fallback_reader import FallbackReader, FileSource, storage_memory
from .file_range import FileRange
from .protocol import Contents, Strip

name = "torch"

_CHUNK_NBYTES = 1 << 20
_GATHER_BELOW_NBYTES = 64 << 10

#: a record's content; an int is the size of a hole
_Value: TypeAlias = "bytes | torch.UntypedStorage | FileRange | int"


class FallbackArchive:
    """See :class:`~statedict_io.backends.protocol.Archive`."""

    def __init__(self, archive_name: str, contents: Contents, *, alignment: int, compute_crc32: bool) -> None:
        data = [
            (f"data/{key}", storage.nbytes() if contents.skip_data else storage)
            for key, storage in enumerate(contents.table.storages)
        ]
        self._records: list[tuple[str, _Value]] = [*contents.head, *data, *contents.tail]
        sizes = [(record_name, _nbytes(value)) for record_name, value in self._records]
        self._layout = ArchiveLayout(archive_name, sizes, alignment)
        self._compute_crc32 = compute_crc32

    @property
    def nbytes(self) -> int:
        return self._layout.nbytes

    def write_fd(self, fd: int, *, durable: bool, progress: ProgressCallback | None) -> None:
        del durable  # the commit's affair; there is no direct I/O here
        strips_module.preallocate(fd, self.nbytes)
        offset = 0
        for chunk in self._chunks(progress):
            if isinstance(chunk, int):
                offset += chunk
                continue
            left = memoryview(chunk)
            while left:
                written = os.pwrite(fd, left, offset)
                if written == 0:
                    raise OSError(errno.EIO, "pwrite wrote nothing")
                offset += written
                left = left[written:]
        os.ftruncate(fd, self.nbytes)

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        for chunk in self._chunks(progress):
            if isinstance(chunk, int):
                chunk = bytes(chunk)
            write(memoryview(chunk))

    def _chunks(self, progress: ProgressCallback | None) -> Iterator[bytes | bytearray | memoryview | int]:
        """The file from front to back; an int is a hole of that many bytes."""
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
                payload = _payload(value)
                serialization_id.fold_write_start(payload)
                crc_of_payload = self._start_crc(payload)
                try:
                    if len(payload) < _GATHER_BELOW_NBYTES:
                        small += payload
                    else:
                        yield small
                        small = bytearray()
                        for start in range(0, len(payload), _CHUNK_NBYTES):
                            yield payload[start : start + _CHUNK_NBYTES]
                            if progress is not None:
                                done = min(start + _CHUNK_NBYTES, len(payload))
                                progress(record.payload_offset + done, self.nbytes)
                finally:  # also when a write failed: no thread outlives the save
                    crc = crc_of_payload()
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

    def _start_crc(self, payload: memoryview) -> Callable[[], int]:
        """Begins to checksum ``payload``, a large one beside its writing; the result waits for it."""
        if not self._compute_crc32:
            return lambda: 0
        if len(payload) < _CHUNK_NBYTES:
            crc = zlib.crc32(payload)
            return lambda: crc
        crcs: list[int] = []
        thread = threading.Thread(target=lambda: crcs.append(zlib.crc32(payload)))
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter is exiting
            return lambda: zlib.crc32(payload)

        def wait() -> int:
            thread.join()
            return crcs[0]

        return wait


def native_table() -> None:
    return None


def plan(archive_name: str, contents: Contents, *, alignment: int, compute_crc32: bool) -> FallbackArchive:
    return FallbackArchive(archive_name, contents, alignment=alignment, compute_crc32=compute_crc32)


def write_strips(
    path: str,
    storages: Sequence[torch.UntypedStorage],
    strips: Sequence[Strip],
    *,
    durable: bool,
    compute_crc32: bool,
    progress: ProgressCallback | None,
) -> list[tuple[int, bytes]]:
    with strips_module.opened(path) as fd:
        results = strips_module.write_strips(fd, storages, strips, compute_crc32=compute_crc32, progress=progress)
        if durable:
            os.fsync(fd)
    return results


def open_archive(fd: int, path: str) -> FallbackReader:
    return FallbackReader(FileSource(fd, path), path)


def lean_pickle(data_pkl: bytes) -> bytes:
    return data_pkl  # to find out what could go takes Python as long as to do it


def _nbytes(value: _Value) -> int:
    if isinstance(value, int):
        return value
    return len(value) if isinstance(value, bytes) else value.nbytes()


def _payload(value: bytes | torch.UntypedStorage) -> memoryview:
    if isinstance(value, bytes):
        return memoryview(value)
    return storage_memory(value if value.device.type == "cpu" else value.cpu())
