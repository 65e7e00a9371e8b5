"""What the parts of a file that the Python backend writes are made of, and how each kind of it comes in chunks:
:func:`payload_of`."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import torch

from .python_reading import storage_memory

CHUNK_NBYTES = 1 << 20
SMALL_NBYTES = 64 << 10  #: what has fewer is not worth a write or a thread of its own
_START_NBYTES = 8


class StorageBytes:
    """Bytes of a storage, as they are at the time of the plan.

    Args:
        name: of what they are, for messages: ``"record data/0"``.
        offset: of the first, in the storage.
        nbytes: None: all from there on.
    """

    def __init__(self, name: str, storage: torch.UntypedStorage, offset: int = 0, nbytes: int | None = None) -> None:
        self.name = name
        self.storage = storage
        self.offset = offset
        self.storage_nbytes = storage.nbytes()
        self._nbytes = self.storage_nbytes - offset if nbytes is None else nbytes
        if not 0 <= offset <= offset + self._nbytes <= self.storage_nbytes:
            raise ValueError(f"{name} is longer than its storage")

    @property
    def is_on_device(self) -> bool:
        return self.storage.device.type != "cpu"

    def nbytes(self) -> int:
        return self._nbytes


class Streamed(Protocol):
    """A payload that is never as a whole in memory."""

    def nbytes(self) -> int:
        """As ``torch.UntypedStorage.nbytes``."""

    def pieces(self, piece_nbytes: int) -> Iterator[memoryview]:
        """From front to back, of at most so many bytes; each is valid until the next."""


#: what a part is made of; an int is the size of a hole
Value: TypeAlias = "bytes | memoryview | StorageBytes | Streamed | int"
#: a part of a file; an int is a hole of that many bytes
Chunk: TypeAlias = "bytes | bytearray | memoryview | int"


class Payload(Protocol):
    """The content of one part, to be gone through once."""

    start: bytes  #: its first 8 bytes, or all; known when :meth:`chunks` has ended
    crc: int  #: the CRC-32, or 0 where none is wanted; known then too

    def chunks(self, report: Callable[[int], None] | None, *, calls_back: bool) -> Iterator[Chunk]:
        """From front to back, each valid until the next.

        Args:
            report: is told, between two chunks, how many bytes of a payload that is not small have been taken.
            calls_back: a caller's code runs in ``report`` or between two chunks.
        """


def payload_of(value: Value, *, compute_crc32: bool) -> Payload:
    if isinstance(value, int):
        return _Hole(value)
    if isinstance(value, (bytes, memoryview, StorageBytes)):
        return _InMemory(value, compute_crc32)
    return _InPieces(value, compute_crc32)


def nbytes_of(value: Value) -> int:
    if isinstance(value, int):
        return value
    return len(value) if isinstance(value, (bytes, memoryview)) else value.nbytes()


class _Hole:
    start = b""
    crc = 0

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes

    def chunks(self, report: Callable[[int], None] | None, *, calls_back: bool) -> Iterator[Chunk]:
        del report, calls_back
        yield self._nbytes


class _InPieces:
    def __init__(self, value: Streamed, compute_crc32: bool) -> None:
        self._value = value
        self._compute_crc32 = compute_crc32
        self.start = b""
        self.crc = 0

    def chunks(self, report: Callable[[int], None] | None, *, calls_back: bool) -> Iterator[Chunk]:
        del calls_back  # nobody frees a buffer of our own
        done = 0
        for piece in self._value.pieces(CHUNK_NBYTES):
            if done == 0:
                self.start = bytes(piece[:_START_NBYTES])
            if self._compute_crc32:
                self.crc = zlib.crc32(piece, self.crc)
            yield piece
            done += len(piece)
            if report is not None:
                report(done)


class _InMemory:
    """Bytes in host memory, for as long as nobody resizes or moves the storage that they are of."""

    def __init__(self, value: bytes | memoryview | StorageBytes, compute_crc32: bool) -> None:
        self._planned: StorageBytes | None = None
        self._compute_crc32 = compute_crc32
        if isinstance(value, StorageBytes):
            self._planned = value
            self._storage = value.storage.cpu() if value.is_on_device else value.storage
            self._address = self._storage.data_ptr()
            self._check_unchanged()
            self._memory = storage_memory(self._storage)[value.offset : value.offset + value.nbytes()]
        else:
            self._memory = memoryview(value)
        self._nbytes = len(self._memory)
        self.start = bytes(self._memory[:_START_NBYTES])
        self.crc = 0

    def chunks(self, report: Callable[[int], None] | None, *, calls_back: bool) -> Iterator[Chunk]:
        if self._nbytes < SMALL_NBYTES:
            if self._compute_crc32:
                self.crc = zlib.crc32(self._memory)
            yield self._memory
            return
        # A caller's code may free what a thread is reading: no thread runs while it is called.
        checked_nbytes = CHUNK_NBYTES if calls_back else self._nbytes
        for start in range(0, self._nbytes, checked_nbytes):
            piece = self._memory[start : start + checked_nbytes]
            yield from self._checked(piece)
            if report is not None:
                report(start + len(piece))
                self._check_unchanged()

    def _checked(self, piece: memoryview) -> Iterator[memoryview]:
        crc_of_piece = self._start_crc(piece)
        try:
            for at in range(0, len(piece), CHUNK_NBYTES):
                yield piece[at : at + CHUNK_NBYTES]
        finally:  # also when a write failed: no thread outlives the save
            self.crc = crc_of_piece()
        self._check_unchanged()

    def _start_crc(self, piece: memoryview) -> Callable[[], int]:
        """Begins to extend the checksum by ``piece`` beside its writing; the result waits for it."""
        if not self._compute_crc32:
            return lambda: 0
        crc, crcs = self.crc, list[int]()
        thread = threading.Thread(target=lambda: crcs.append(zlib.crc32(piece, crc)))
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter is exiting
            return lambda: zlib.crc32(piece, crc)

        def wait() -> int:
            thread.join()
            return crcs[0]

        return wait

    def _check_unchanged(self) -> None:
        planned = self._planned
        if planned is None:
            return
        nbytes = self._storage.nbytes()
        if nbytes != planned.storage_nbytes or self._storage.data_ptr() != self._address:
            raise RuntimeError(
                f"the storage of {planned.name} was resized or moved while it was being saved: "
                f"it had {planned.storage_nbytes} bytes, now it has {nbytes}"
            )
