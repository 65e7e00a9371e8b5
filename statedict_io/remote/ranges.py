"""An object of a store as a source of byte ranges, for the reader of archives and, as a file object, for torch.

Every range is one request. All are of one version of the object where the store can promise that (S3: If-Match).
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .stores import Place, locate, naming_errors

_MIB = 1 << 20
# An archive's names and offsets are at its end, its data.pkl at its beginning: each is fetched once, with a bit around.
_HEAD_NBYTES = 64 << 10
_TAIL_NBYTES = 128 << 10
#: more is fetched in pieces, because what is fetched is held next to where it goes
MAX_RANGE_NBYTES = 8 * _MIB
_STREAM_NBYTES = 1 * _MIB


class RangedObject:
    """May be used from several threads. ``nbytes`` is the object's size."""

    def __init__(self, file: Any, url: str) -> None:
        self.name = url
        self._fetch: Callable[[int, int], bytes] = _fetcher(file)
        with naming_errors(url):
            self.nbytes = _nbytes_of(file)
        self._edge_lock = threading.Lock()
        self._edges: dict[int, bytes] = {}  # by their offset

    def read_into(self, destination: memoryview, offset: int) -> None:
        """See :class:`~statedict_io.backends.python_reading.PositionalSource`.

        Raises:
            OSError: what the store reported, with the URL.
        """
        while destination:
            data = self._at(offset, min(len(destination), MAX_RANGE_NBYTES))
            destination[: len(data)] = data
            destination = destination[len(data) :]
            offset += len(data)

    def stream(self) -> io.BufferedReader:
        """A file object, independent of others."""
        return io.BufferedReader(_Stream(self), _STREAM_NBYTES)

    def _at(self, offset: int, nbytes: int) -> bytes | memoryview:
        """At least one byte and at most ``nbytes``."""
        for start, end in ((0, _HEAD_NBYTES), (self.nbytes - _TAIL_NBYTES, self.nbytes)):
            start, end = max(start, 0), min(end, self.nbytes)
            if start <= offset < end and (offset + nbytes <= end or start == 0):
                return memoryview(self._edge(start, end))[offset - start : offset - start + nbytes]
        return self._fetched(offset, offset + nbytes)

    def _edge(self, start: int, end: int) -> bytes:
        with self._edge_lock:
            if start not in self._edges:
                self._edges[start] = self._fetched(start, end)
            return self._edges[start]

    def _fetched(self, start: int, end: int) -> bytes:
        if end > self.nbytes:
            raise EOFError
        with naming_errors(self.name):
            data = self._fetch(start, end)
        if len(data) != end - start:
            raise EOFError
        return data


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
        left = max(self._source.nbytes - self._position, 0)
        destination = destination[: min(left, MAX_RANGE_NBYTES)]
        if not destination:
            return 0
        data = self._source._at(self._position, len(destination))
        destination[: len(data)] = data
        self._position += len(data)
        return len(data)


@dataclass(frozen=True)
class OpenedURL:
    """What to read instead of a URL: a file that is here, or ranges of an object that is not."""

    url: str
    content: str | RangedObject  #: a path: of the file itself, or of the copy that a caching scheme has made


@contextlib.contextmanager
def open_url(url: str) -> Iterator[OpenedURL]:
    """Open inside the block.

    Raises:
        OSError: what the store reported, with the URL: FileNotFoundError where there is no such object.
        ImportError, ValueError: as :func:`~statedict_io.remote.stores.locate`.
    """
    place = locate(url)
    if place.local_path is not None:
        yield OpenedURL(place.url, place.local_path)
        return
    with contextlib.ExitStack() as exit_stack:
        with naming_errors(place.url):
            file = exit_stack.enter_context(contextlib.closing(_open(place)))
        copy = _path_of_copy(file)
        yield OpenedURL(place.url, RangedObject(file, place.url) if copy is None else copy)


def _open(place: Place) -> Any:
    from fsspec.implementations.cached import CachingFileSystem

    with contextlib.suppress(AttributeError):
        place.fs.invalidate_cache(place.path)  # of listings, which may know another size
    # A caching scheme has one of its own.
    options = {} if isinstance(place.fs, CachingFileSystem) else {"cache_type": "none"}
    return place.fs.open(place.path, "rb", **options)


def _path_of_copy(file: Any) -> str | None:
    from fsspec.implementations.local import LocalFileOpener

    if isinstance(file, LocalFileOpener):
        file = file.f
    return str(file.name) if isinstance(file, (io.BufferedReader, io.FileIO)) and isinstance(file.name, str) else None


def _nbytes_of(file: Any) -> int:
    # The size of an fsspec file; others have to be asked.
    size = getattr(file, "size", None)
    if isinstance(size, int):
        return size
    return int(file.seek(0, io.SEEK_END))


def _fetcher(file: Any) -> Callable[[int, int], bytes]:
    """``fetch(start, end)``, for any thread."""
    from fsspec.spec import AbstractBufferedFile

    cache = getattr(file, "cache", None)
    if isinstance(file, AbstractBufferedFile) and getattr(cache, "name", None) == "none":
        # What fsspec's caches call. Without one a file's read() is this and a position, which threads cannot share.
        fetch: Callable[[int, int], bytes] = file._fetch_range
        return fetch
    if isinstance(file, io.BytesIO):  # memory:// hands the same one to everybody, with its position
        return lambda start, end: bytes(file.getbuffer()[start:end])
    lock = threading.Lock()

    def seek_and_read(start: int, end: int) -> bytes:
        with lock:
            file.seek(start)
            pieces = []
            while start < end and (piece := file.read(end - start)):
                pieces.append(piece)
                start += len(piece)
        return b"".join(pieces)

    return seek_and_read
