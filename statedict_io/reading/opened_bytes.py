"""The bytes that are read, open: of a file, or of an object in a store."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from .. import backends
from ..backends.protocol import Backend, OpenArchive
from ..errors import corrupt, naming
from ..remote.urls import is_url
from ..system.descriptors import descriptor_of, read_at, read_into

if TYPE_CHECKING:
    from ..archive.payload_ranges import RangeEntries
    from ..remote.ranges import RangedObject
    from ..system.scattered import Read

# A round trip takes milliseconds, in which so much could have come.
_CHEAP_NBYTES_OF_NETWORK = 256 << 10
_CHEAP_NBYTES = 4 << 10
_END_NBYTES = 128 << 10  # the directory of some thousand records; their data.pkl
_FIRST_NBYTES = 1 << 20


class OpenedBytes(Protocol):
    """May be read from several threads."""

    name: str  #: what errors call it
    nbytes: int
    backend: Backend

    @property
    def mtime_ns(self) -> int | None:
        """Of the file when it was opened, ns since the epoch; None where nobody knows."""

    @property
    def store_version(self) -> str | None:
        """Of an object in a store that tells one version from another."""

    @property
    def descriptor(self) -> int | None:
        """Of the file, for reading; None where there is none."""

    @property
    def cheap_nbytes(self) -> int:
        """A read of so many costs what a read of one byte does."""

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """``nbytes`` bytes from ``offset`` on, fewer at the end."""

    def open_archive(self) -> OpenArchive: ...

    def open_payloads(self, payloads: RangeEntries) -> OpenArchive: ...

    def stream(self) -> BinaryIO:
        """A file object at the beginning, independent of others; what it closes is its own."""


class FileBytes:
    """The file behind a descriptor, which stays the caller's."""

    cheap_nbytes = _CHEAP_NBYTES
    store_version = None

    def __init__(self, fd: int, name: str, backend: Backend) -> None:
        found = os.fstat(fd)
        self.descriptor, self.name, self.backend = fd, name, backend
        self.nbytes, self.mtime_ns = found.st_size, found.st_mtime_ns

    def read_at(self, offset: int, nbytes: int) -> bytes:
        # No more memory than there are bytes, whatever a header claims; one call reads 2 GiB at most.
        with naming(self.name):
            left = max(min(nbytes, os.fstat(self.descriptor).st_size - offset), 0)
            data = read_at(self.descriptor, left, offset)
            while len(data) < left and (more := read_at(self.descriptor, left - len(data), offset + len(data))):
                data += more
        return data

    def open_archive(self) -> OpenArchive:
        return self.backend.open_archive(self.descriptor, self.name)

    def open_payloads(self, payloads: RangeEntries) -> OpenArchive:
        return self.backend.open_payloads(self.descriptor, self.name, payloads)

    def stream(self) -> BinaryIO:
        return io.BufferedReader(_FileStream(self.descriptor), _FIRST_NBYTES)


class ObjectBytes:
    """An object of a store, which must stay open."""

    descriptor = None
    cheap_nbytes = _CHEAP_NBYTES_OF_NETWORK

    def __init__(self, source: RangedObject, backend: Backend) -> None:
        self.source = source
        self.name, self.nbytes, self.backend = source.name, source.nbytes, backend
        self.mtime_ns, self.store_version = source.mtime_ns, source.version

    def read_at(self, offset: int, nbytes: int) -> bytes:
        data = bytearray(max(min(nbytes, self.nbytes - offset), 0))
        try:
            self.source.read_into(memoryview(data), offset)
        except EOFError:
            raise corrupt(self.name, "the file became shorter while it was read") from None
        return bytes(data)

    def open_archive(self) -> OpenArchive:
        from ..backends.ranged_reading import RangedOpenArchive

        return RangedOpenArchive(self.source, self.name)

    def open_payloads(self, payloads: RangeEntries) -> OpenArchive:
        from ..backends.ranged_reading import RangedOpenArchive

        return RangedOpenArchive(self.source, self.name, payloads=payloads)

    def stream(self) -> BinaryIO:
        return self.source.stream()


class PartOfBytes:
    """A range of others, which is a file in itself.

    Args:
        whole: what it is a range of; kept.
        name: what errors call it.
    """

    mtime_ns = None
    descriptor = None
    store_version = None

    def __init__(self, whole: OpenedBytes, offset: int, nbytes: int, name: str) -> None:
        self._whole, self._offset = whole, offset
        self.nbytes, self.name = nbytes, name
        self.backend, self.cheap_nbytes = whole.backend, whole.cheap_nbytes

    def read_at(self, offset: int, nbytes: int) -> bytes:
        return self._whole.read_at(self._offset + offset, max(min(nbytes, self.nbytes - offset), 0))

    def read_into(self, destination: memoryview, offset: int) -> None:
        """See :class:`~statedict_io.backends.python_reading.PositionalSource`."""
        if offset + len(destination) > self.nbytes:
            raise EOFError
        fd, at = self._whole.descriptor, self._offset + offset
        while destination:
            if fd is None:
                data = self._whole.read_at(at, len(destination))
                destination[: len(data)] = data
                taken = len(data)
            else:
                with naming(self.name):
                    taken = read_into(fd, destination, at)
            if taken == 0:
                raise EOFError
            destination, at = destination[taken:], at + taken

    def open_archive(self) -> OpenArchive:
        return self._opened(None)

    def open_payloads(self, payloads: RangeEntries) -> OpenArchive:
        return self._opened(payloads)

    def _opened(self, payloads: RangeEntries | None) -> OpenArchive:
        if isinstance(self._whole, ObjectBytes):
            from ..backends.ranged_reading import RangedOpenArchive

            part = _PartOfObject(self._whole.source, self._offset, self.nbytes)
            return RangedOpenArchive(part, self.name, payloads=payloads)
        from ..backends.python_reading import PythonOpenArchive

        return PythonOpenArchive(self, self.name, payloads=payloads)

    def stream(self) -> BinaryIO:
        return io.BufferedReader(_PartStream(self), _FIRST_NBYTES)


class _PartOfObject:
    """See :class:`~statedict_io.backends.ranged_reading.RangeSource`."""

    def __init__(self, source: RangedObject, offset: int, nbytes: int) -> None:
        self._source = source
        self._offset = offset
        self.nbytes = nbytes
        self.num_connections, self.max_read_nbytes = source.num_connections, source.max_read_nbytes

    def read_into(self, destination: memoryview, offset: int) -> None:
        if offset + len(destination) > self.nbytes:
            raise EOFError
        self._source.read_into(destination, self._offset + offset)

    def read_ranges(self, reads: Sequence[Read], tick: Callable[[int], object] | None = None) -> None:
        if any(read.end > self.nbytes for read in reads):
            raise EOFError
        self._source.read_ranges([read.moved(self._offset) for read in reads], tick)

    def keep(self, spans: Sequence[tuple[int, int]]) -> None:
        self._source.keep([(self._offset + begin, self._offset + end) for begin, end in spans])


@contextmanager
def open_bytes(
    path: Any, backend: str = "auto", *, random_access: bool = False, name: str | None = None
) -> Iterator[OpenedBytes]:
    """The file at ``path``, or at a URL, which is open inside the block.

    ``random_access`` tells the kernel not to read ahead. ``name`` is what errors call the file, where not by its path.

    Raises:
        OSError: the file cannot be opened; in the block also whatever of a read names no file.
        NativeUnavailableError, ImportError, ValueError: as of the readers.
    """
    chosen = backends.for_reading(backend)
    backends.warn_if_reading_is_slow(backend)
    if not is_url(path):
        given = os.fsdecode(path)
        with _opened_file(given, name or given, chosen, random_access) as opened:
            yield opened
        return
    from ..remote import opening

    with opening.open_url(path) as found:
        if isinstance(found.content, str):
            with _opened_file(found.content, found.url, chosen, random_access) as opened:
                yield opened
        else:
            yield ObjectBytes(found.content, chosen)


@contextmanager
def _opened_file(path: str, given: str, chosen: Backend, random_access: bool) -> Iterator[FileBytes]:
    """``given``: what errors call it."""
    with naming(given), descriptor_of(path, os.O_RDONLY) as fd:
        if random_access and hasattr(os, "posix_fadvise"):
            # The directory is at the end and data.pkl at the beginning: the disk fetches both at once.
            for begin in (max(0, os.fstat(fd).st_size - _END_NBYTES), 0):
                _advise(fd, begin, _END_NBYTES, os.POSIX_FADV_WILLNEED)
            _advise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        yield FileBytes(fd, given, chosen)


def _advise(fd: int, offset: int, nbytes: int, advice: int) -> None:
    with suppress(OSError):  # a file system that takes none reads as well
        os.posix_fadvise(fd, offset, nbytes, advice)


class _PositionalStream(io.RawIOBase):
    """Reads by position: a descriptor's own stays where it is."""

    def __init__(self) -> None:
        self._position = 0

    def _nbytes(self) -> int:
        raise NotImplementedError

    def _read_into(self, destination: memoryview, offset: int) -> int:
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._nbytes()}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        taken = self._read_into(memoryview(buffer).cast("B"), self._position)
        self._position += taken
        return taken


class _FileStream(_PositionalStream):
    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def _nbytes(self) -> int:
        return os.fstat(self._fd).st_size

    def _read_into(self, destination: memoryview, offset: int) -> int:
        return read_into(self._fd, destination, offset)


class _PartStream(_PositionalStream):
    def __init__(self, part: PartOfBytes) -> None:
        super().__init__()
        self._part = part

    def _nbytes(self) -> int:
        return self._part.nbytes

    def _read_into(self, destination: memoryview, offset: int) -> int:
        data = self._part.read_at(offset, len(destination))
        destination[: len(data)] = data
        return len(data)
