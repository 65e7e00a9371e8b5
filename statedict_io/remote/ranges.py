"""An object of a store as a source of byte ranges, for the reader of archives and, as a file object, for torch.

All ranges are of one version of the object where the store can promise that (S3: ETag).
"""

from __future__ import annotations

import abc
import io
from collections.abc import Callable, Sequence
from typing import Any

from ..system.scattered import Read, Scatter
from .interrupts import Interrupt
from .side_by_side import perform
from .stores import naming_errors

# An archive's names and offsets are at its end, its data.pkl at its beginning: each is fetched once, with a bit around.
HEAD_NBYTES = 64 << 10
TAIL_NBYTES = 128 << 10
_STREAM_NBYTES = 1 << 20
_MAX_NUM_KEPT = 8


class RangedObject(abc.ABC):
    """May be used from several threads.

    Attributes:
        name: the URL.
        nbytes: the object's size.
        version: equal for one content of the object; None where the store does not tell.
        mtime_ns: when that was put there, ns since the epoch, as precise as the store tells; None where it does not.
        num_connections: so many ranges are read side by side.
        max_read_nbytes: more is read in several ranges.
    """

    name: str
    nbytes: int
    version: str | None
    mtime_ns: int | None
    num_connections: int
    max_read_nbytes: int

    _kept: Sequence[tuple[int, memoryview]] = ()

    def read_into(self, destination: memoryview, offset: int) -> None:
        """See :class:`~statedict_io.backends.python_reading.PositionalSource`.

        Raises:
            OSError: what the store reported, with the URL.
        """
        nbytes = len(destination)
        num_reads = max(-(-nbytes // self.max_read_nbytes), 1)
        step = max(-(-nbytes // num_reads), 1)
        reads = []
        for at in range(0, nbytes, step):
            piece = destination[at : at + step]
            reads.append(Read(offset + at, len(piece), [piece]))
        self.read_ranges(reads)

    def read_ranges(self, reads: Sequence[Read], tick: Callable[[int], object] | None = None) -> None:
        """Reads all, side by side; one that fails is repeated by itself.

        Args:
            tick: called in this thread again and again with the progress.

        Raises:
            EOFError: the object has fewer bytes.
            OSError: what the store reported, with the URL.
        """
        if any(read.end > self.nbytes for read in reads):
            raise EOFError
        with naming_errors(self.name, apart_from=EOFError):
            perform([_Range(self, read) for read in reads], self.num_connections, tick)

    def keep(self, spans: Sequence[tuple[int, int]]) -> None:
        """Reads, at once, what will be asked for in small pieces. What was kept long ago is forgotten.

        Args:
            spans: (begin, end) of each.
        """
        kept = [(begin, memoryview(bytearray(end - begin))) for begin, end in spans]
        self.read_ranges([Read(begin, len(data), [data]) for begin, data in kept])
        self._kept = [*self._kept, *kept][-_MAX_NUM_KEPT:]

    def known_at(self, offset: int, nbytes: int) -> tuple[int, memoryview] | None:
        """What is there without a request, as (offset, bytes), if that has the byte at ``offset``; ``nbytes`` are
        wanted."""
        for start, data in self._kept:
            if start <= offset < start + len(data):
                return start, data
        edge = self.edge_at(offset, nbytes)
        return None if edge is None else (edge[0], memoryview(edge[1]))

    def stream(self) -> io.BufferedReader:
        """A file object, independent of others."""
        return io.BufferedReader(_Stream(self), _STREAM_NBYTES)

    @abc.abstractmethod
    def edge_at(self, offset: int, nbytes: int) -> tuple[int, bytes] | None:
        """The beginning or the end of the object, as (offset, bytes), if that has the byte at ``offset`` and is there,
        or worth fetching for a read of so many bytes."""

    @abc.abstractmethod
    def fetch(self, offset: int, end: int, scatter: Scatter, interrupt: Interrupt) -> None:
        """Fetches a range that is not empty.

        Raises:
            EOFError: there are fewer bytes.
            Exception: what the store reported, after the repetitions.
        """


class _Range:
    """See :class:`~statedict_io.remote.side_by_side.Request`."""

    def __init__(self, source: RangedObject, read: Read) -> None:
        self.nbytes, self.counted_nbytes = read.nbytes, read.counted_nbytes
        self._source = source
        self._read = read
        self._buffers: Sequence[memoryview] | None = None
        self._first: Scatter | None = None

    def send(self, interrupt: Interrupt) -> None:
        read = self._read
        if self._buffers is None:
            self._buffers = read.begin()
        # Who comes second goes on where the first one is.
        scatter = Scatter(self._buffers, 0 if self._first is None else self._first.nbytes_done)
        self._first = self._first or scatter
        offset, end = read.offset + scatter.nbytes_done, read.end
        while offset < end and (known := self._source.known_at(offset, end - offset)) is not None:
            start, data = known
            piece = data[offset - start : end - start]
            scatter.write(piece)
            offset += len(piece)
        if offset < end and (known := self._source.known_at(end - 1, end - offset)) is not None and known[0] > offset:
            start, data = known
            Scatter(self._buffers, start - read.offset).write(data[: end - start])
            end = start
        if offset < end:
            self._source.fetch(offset, end, scatter, interrupt)

    def finish(self) -> None:
        assert self._buffers is not None
        self._read.finish(self._buffers)
        self._buffers = self._first = None


class _Stream(io.RawIOBase):
    """For what reads from front to back, or looks at the first bytes and leaves."""

    def __init__(self, source: RangedObject) -> None:
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.nbytes}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        destination = memoryview(buffer).cast("B")
        destination = destination[: max(self._source.nbytes - self._position, 0)]
        known = self._source.known_at(self._position, HEAD_NBYTES) if destination else None
        if known is not None:  # no more than is there
            destination = destination[: known[0] + len(known[1]) - self._position]
        if destination:
            self._source.read_into(destination, self._position)
        self._position += len(destination)
        return len(destination)
