"""Reading an archive in pure Python over torch: see :class:`~statedict_io.backends.protocol.ArchiveReader`.

Positional reads straight into the final storages. Reading and zlib release the GIL, so a few threads share the work.
"""

from __future__ import annotations

import ctypes
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

import torch

from ..errors import CorruptCheckpointError, corrupt
from ..progress import ProgressCallback
from .directory import LOCAL_NBYTES, Directory, read_directory
from .inflate import Damage, inflated
from .protocol import RecordEntry

_NUM_THREADS = 4
_PIECE_NBYTES = 8 << 20
_CHECKED_PIECE_NBYTES = 1 << 20  # is still in cache when it is checksummed
# Below this records are read together, with what lies between them, and copied.
_SMALL_NBYTES = 64 << 10
_RUN_NBYTES = 1 << 20
_SIGNAL_SECONDS = 0.05

_T = TypeVar("_T")


class Source(Protocol):
    """Bytes by position: a file, or an object that is like one."""

    nbytes: int

    def read_into(self, destination: memoryview, offset: int) -> None:
        """Fills ``destination``; may be called from several threads at once.

        Raises:
            EOFError: the source has fewer bytes than it had.
        """


class FileSource:
    """The file behind a descriptor, which stays the caller's. System errors carry ``path``."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd, self._path = fd, path
        self.nbytes = os.fstat(fd).st_size

    def read_into(self, destination: memoryview, offset: int) -> None:
        try:
            while destination:
                taken = os.preadv(self._fd, [destination], offset)
                if taken == 0:
                    raise EOFError
                destination = destination[taken:]
                offset += taken
        except OSError as e:
            e.filename = self._path
            raise


def storage_memory(storage: torch.UntypedStorage) -> memoryview:
    """The bytes of a CPU storage, writable; keeps the storage."""
    if storage.nbytes() == 0:
        return memoryview(bytearray())
    memory = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    memory._storage = storage  # the view's owner is this object, and now also of the memory
    return memoryview(memory).cast("B")


def new_storage(nbytes: int) -> torch.UntypedStorage:
    # A slice, because that cannot be resized.
    return torch.UntypedStorage(nbytes, device="cpu")[0:nbytes]


class FallbackReader:
    """See :class:`~statedict_io.backends.protocol.ArchiveReader`."""

    def __init__(self, source: Source, path: str) -> None:
        self._source = source
        self._path = path
        self._directory: Directory = self._guarded(lambda: read_directory(self._read_at, source.nbytes))

    @property
    def archive_name(self) -> str:
        return self._directory.archive_name

    @property
    def records(self) -> Sequence[RecordEntry]:
        return self._directory.entries

    def payload_offset(self, record: int) -> int:
        header_nbytes = LOCAL_NBYTES + len(self._directory.full_names[record])
        return self._guarded(
            lambda: self._directory.payload_offset(
                record, self._read_at(self.records[record].header_offset, header_nbytes)
            )
        )

    def read(self, record: int) -> bytes:
        entry = self.records[record]
        offset = self.payload_offset(record)
        if not entry.compressed:
            return self._guarded(lambda: self._read_at(offset, entry.nbytes))
        return b"".join(self._guarded(lambda: list(self._inflated(record, offset))))

    def read_range(self, record: int, offset: int, destination: memoryview) -> None:
        entry = self.records[record]
        if entry.compressed or offset < 0 or offset + destination.nbytes > entry.nbytes:
            raise ValueError(f"no range of {entry.name}: bytes {offset} to {offset + destination.nbytes}")
        start = self.payload_offset(record) + offset
        self._guarded(lambda: self._source.read_into(destination, start))

    def load_storages(
        self, records: Sequence[int], *, verify: bool, progress: ProgressCallback | None
    ) -> list[torch.UntypedStorage]:
        storages: dict[int, torch.UntypedStorage] = {}
        corrupt_records: list[int] = []
        runs: list[Callable[[], int]] = []
        tasks: list[Callable[[], int]] = []

        def check(record: int, crc: int) -> None:
            if verify and crc != self.records[record].crc32:
                corrupt_records.append(record)

        def run_task(run: list[int]) -> Callable[[], int]:
            return lambda: self._load_run(run, storages, check if verify else None)

        def whole_task(record: int) -> Callable[[], int]:
            return lambda: self._load_whole(record, storages, check if verify else None)

        def piece_task(storage: torch.UntypedStorage, offset: int, start: int) -> Callable[[], int]:
            return lambda: self._load_piece(storage, offset, start)

        small, large = self._split(set(records))
        runs.extend(run_task(run) for run in self._runs(small))
        for record in large:
            entry = self.records[record]
            if verify or entry.compressed:
                tasks.append(whole_task(record))
                continue
            offset = self.payload_offset(record)
            storages[record] = new_storage(entry.nbytes)
            starts = range(0, entry.nbytes, _PIECE_NBYTES)
            tasks.extend(piece_task(storages[record], offset, start) for start in starts)
        total = sum(self.records[record].nbytes for record in {*small, *large})
        # Runs are mostly Python's work: more threads would only wait for each other.
        self._guarded(lambda: _perform(runs, tasks, total, progress))
        if corrupt_records:
            raise self._checksum_error(corrupt_records)
        return [storages[record] for record in records]

    def checksums(self, records: Sequence[int], *, progress: ProgressCallback | None) -> list[int]:
        crcs: dict[int, int] = {}

        def task(record: int) -> Callable[[], int]:
            def checksum() -> int:
                crc = 0
                for piece in self._pieces(record, self.payload_offset(record)):
                    crc = zlib.crc32(piece, crc)
                crcs[record] = crc
                return self.records[record].nbytes

            return checksum

        unique = set(records)
        total = sum(self.records[record].nbytes for record in unique)
        tasks = [task(record) for record in sorted(unique, key=lambda r: self.records[r].header_offset)]
        self._guarded(lambda: _perform([], tasks, total, progress))
        return [crcs[record] for record in records]

    def _split(self, records: Iterable[int]) -> tuple[list[int], list[int]]:
        """Small and large ones, each in file order."""
        small: list[int] = []
        large: list[int] = []
        for record in sorted(records, key=lambda r: self.records[r].header_offset):
            entry = self.records[record]
            span = self._directory.limit_offsets[record] - entry.header_offset
            (large if entry.compressed or span > 2 * _SMALL_NBYTES else small).append(record)
        return small, large

    def _runs(self, small: list[int]) -> Iterator[list[int]]:
        """Neighbours, up to ``_RUN_NBYTES`` from the first header to the end of the last record."""
        run: list[int] = []
        for record in small:
            if run and (
                self._directory.limit_offsets[record] - self.records[run[0]].header_offset > _RUN_NBYTES
                or self.records[record].header_offset - self._directory.limit_offsets[run[-1]] > _SMALL_NBYTES
            ):
                yield run
                run = []
            run.append(record)
        if run:
            yield run

    def _load_run(
        self, run: list[int], storages: dict[int, torch.UntypedStorage], check: Callable[[int, int], None] | None
    ) -> int:
        start = self.records[run[0]].header_offset
        data = self._read_at(start, self._directory.limit_offsets[run[-1]] - start)
        nbytes = 0
        for record in run:
            entry = self.records[record]
            header_at = entry.header_offset - start
            name_nbytes = len(self._directory.full_names[record])
            payload_at = (
                self._directory.payload_offset(record, data[header_at : header_at + LOCAL_NBYTES + name_nbytes]) - start
            )
            payload = data[payload_at : payload_at + entry.nbytes]
            storage = storages[record] = new_storage(entry.nbytes)
            ctypes.memmove(storage.data_ptr(), payload, entry.nbytes)
            if check is not None:
                check(record, zlib.crc32(payload))
            nbytes += entry.nbytes
        return nbytes

    def _load_whole(
        self, record: int, storages: dict[int, torch.UntypedStorage], check: Callable[[int, int], None] | None
    ) -> int:
        entry = self.records[record]
        offset = self.payload_offset(record)
        storage = storages[record] = new_storage(entry.nbytes)
        memory = storage_memory(storage)
        crc = 0
        if entry.compressed:
            at = 0
            for piece in self._inflated(record, offset):
                memory[at : at + len(piece)] = piece
                crc = zlib.crc32(piece, crc)
                at += len(piece)
        else:
            for start in range(0, entry.nbytes, _CHECKED_PIECE_NBYTES):
                piece_of_memory = memory[start : start + _CHECKED_PIECE_NBYTES]
                self._source.read_into(piece_of_memory, offset + start)
                crc = zlib.crc32(piece_of_memory, crc)
        if check is not None:
            check(record, crc)
        return entry.nbytes

    def _load_piece(self, storage: torch.UntypedStorage, offset: int, start: int) -> int:
        piece = storage_memory(storage)[start : start + _PIECE_NBYTES]
        self._source.read_into(piece, offset + start)
        return len(piece)

    def _pieces(self, record: int, offset: int) -> Iterator[bytes | memoryview]:
        """The payload from front to back; a piece is valid until the next one."""
        entry = self.records[record]
        if entry.compressed:
            yield from self._inflated(record, offset)
            return
        buffer = memoryview(bytearray(min(entry.nbytes, _CHECKED_PIECE_NBYTES)))
        for start in range(0, entry.nbytes, _CHECKED_PIECE_NBYTES):
            piece = buffer[: entry.nbytes - start]
            self._source.read_into(piece, offset + start)
            yield piece

    def _inflated(self, record: int, offset: int) -> Iterator[bytes]:
        return inflated(lambda at, nbytes: self._read_at(offset + at, nbytes), self.records[record])

    def _read_at(self, offset: int, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        self._source.read_into(memoryview(data), offset)
        return bytes(data)

    def _guarded(self, action: Callable[[], _T]) -> _T:
        try:
            return action()
        except Damage as e:
            raise corrupt(self._path, str(e)) from None
        except EOFError:
            raise corrupt(self._path, "the file became shorter while it was read") from None

    def _checksum_error(self, records: list[int]) -> CorruptCheckpointError:
        names = [self.records[record].name for record in sorted(records)]
        return corrupt(self._path, f"checksums do not match in {', '.join(names)}", names)


def _perform(
    alone: list[Callable[[], int]], together: list[Callable[[], int]], total: int, progress: ProgressCallback | None
) -> None:
    """Runs tasks in this thread, and those that are much work on several. ``progress`` is called in this thread with
    the sum of what they return; the first error, also of ``progress``, ends the rest."""
    done = 0
    for task in alone if total > _PIECE_NBYTES else [*alone, *together]:
        done += task()
        if progress is not None:
            progress(done, total)
    if total <= _PIECE_NBYTES or not together:
        return
    lock = threading.Lock()
    queue = iter(together)
    stopped = False

    def work() -> None:
        nonlocal done, stopped
        while not stopped:
            with lock:
                task = next(queue, None)
            if task is None:
                return
            try:
                nbytes = task()
            except BaseException:
                stopped = True
                raise
            with lock:
                done += nbytes

    pool = ThreadPoolExecutor(min(_NUM_THREADS, len(together)))
    try:
        workers: set[Future[None]] = set()
        try:
            while len(workers) < min(_NUM_THREADS, len(together)):
                workers.add(pool.submit(work))
        except RuntimeError:  # no more threads, or the interpreter is exiting
            if not workers:
                work()
        pending = workers
        while pending:
            _, pending = wait(pending, timeout=_SIGNAL_SECONDS, return_when=FIRST_EXCEPTION)
            if progress is not None:
                progress(done, total)
        for worker in workers:
            worker.result()
    finally:
        stopped = True
        pool.shutdown()
