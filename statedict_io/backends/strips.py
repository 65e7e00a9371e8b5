"""Writing strips without compiled code; see :class:`~statedict_io.backends.protocol.Strip`."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch

from ..archive import crc32
from ..progress import ProgressCallback
from ..system.descriptors import NOFOLLOW, open_file, write_all_at
from .protocol import Strip
from .python_reading import storage_memory

_CHUNK_NBYTES = 1 << 20
_SYNC_FILE_RANGE_WRITE = 2  # man 2 sync_file_range


@contextlib.contextmanager
def open_existing(path: str) -> Iterator[int]:
    """A descriptor of an existing file. System errors within carry ``path``; close's too, which may report that a write
    failed (NFS, quota).

    Only for writing: a network file system then keeps the bytes of a page that this process wrote apart from those that
    others write.
    """
    try:
        fd = open_file(path, os.O_WRONLY | NOFOLLOW)
        try:
            yield fd
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(fd)
            raise
        os.close(fd)
    except OSError as e:
        if e.errno is not None:
            e.filename = path
        raise


def write_strips(
    fd: int,
    storages: Sequence[torch.UntypedStorage],
    strips: Sequence[Strip],
    *,
    compute_crc32: bool,
    progress: ProgressCallback | None,
) -> list[tuple[int, bytes]]:
    """Of :class:`~statedict_io.backends.protocol.Backend`, into an open file."""
    total = sum(strip.row_nbytes * strip.num_rows for strip in strips)
    done = 0
    results = []
    for strip in strips:
        storage = storages[strip.source]
        crc = 0
        first_bytes = b""
        if strip.num_rows == 1:
            for start in range(0, strip.row_nbytes, _CHUNK_NBYTES):
                nbytes = min(_CHUNK_NBYTES, strip.row_nbytes - start)
                chunk = bytes_of(storage, strip.source_offset + start, nbytes)
                first_bytes = first_bytes or bytes(chunk[:8])
                if compute_crc32:
                    crc = zlib.crc32(chunk, crc)
                write_all_at(fd, chunk, strip.file_offset + start)
                done += nbytes
                if progress is not None:
                    progress(done, total)
        else:
            over_pitch = crc32.shifter(strip.file_pitch)
            rows_per_chunk = max(_CHUNK_NBYTES // strip.row_nbytes, 1)
            for first in range(0, strip.num_rows, rows_per_chunk):
                num_rows = min(rows_per_chunk, strip.num_rows - first)
                start = strip.source_offset + first * strip.row_nbytes
                chunk = bytes_of(storage, start, num_rows * strip.row_nbytes)
                first_bytes = first_bytes or bytes(chunk[:8])
                for row in range(num_rows):
                    line = chunk[row * strip.row_nbytes : (row + 1) * strip.row_nbytes]
                    if compute_crc32:
                        crc = crc32.shift_by(over_pitch, crc) ^ zlib.crc32(line)
                    write_all_at(fd, line, strip.file_offset + (first + row) * strip.file_pitch)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
        results.append((crc32.shift(crc, strip.nbytes_after), first_bytes))
    if progress is not None:
        progress(total, total)
    return results


def bytes_of(storage: torch.UntypedStorage, offset: int, nbytes: int) -> memoryview:
    """Of a CPU storage where they are, of another copied to the CPU."""
    if storage.device.type != "cpu":
        on_device = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, offset, (nbytes,), (1,))
        storage, offset = on_device.cpu().untyped_storage(), 0
    return storage_memory(storage)[offset : offset + nbytes]


def set_nbytes(fd: int, nbytes: int) -> None:
    """Cuts or extends the file; where its length is right, not even a file system that cannot is asked."""
    with contextlib.suppress(OSError):
        if os.fstat(fd).st_size == nbytes:
            return
    os.ftruncate(fd, nbytes)


def preallocate(fd: int, nbytes: int) -> None:
    """Reserves blocks, so that a full disk shows before anything is written; a file system that cannot is no error.

    Not ``os.posix_fallocate``: where the file system cannot, glibc's writes a zero into each block instead, and a
    network file system may send those after what other machines wrote there.
    """
    call = _fallocate()
    while call is not None and nbytes and call(fd, 0, 0, nbytes) != 0:
        error_number = ctypes.get_errno()
        if error_number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return
        if error_number != errno.EINTR:
            raise OSError(error_number, os.strerror(error_number))


def start_flushing(fd: int, offset: int, nbytes: int) -> None:
    """Has the system begin to write what lies in its cache to the device, so that a later fsync waits for less. Does
    nothing where the system cannot; what goes wrong is the fsync's to report."""
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    """Linux's; None elsewhere."""
    # glibc's of 64-bit offsets, also in a process of 32 bits; musl's
    return _of_libc(("fallocate64", "fallocate"), [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64])


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's; None elsewhere."""
    return _of_libc(("sync_file_range",), [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint])


def _of_libc(names: Sequence[str], types: list[Any]) -> Callable[[int, int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    for name in names:
        call = getattr(libc, name, None)
        if call is not None:
            call.argtypes = types
            call.restype = ctypes.c_int
            return cast("Callable[[int, int, int, int], int]", call)
    return None
