"""Ranges of what any fsspec file system opens for reading."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..system.scattered import Scatter
from .interrupts import Interrupt
from .ranges import HEAD_NBYTES, TAIL_NBYTES, RangedObject
from .stores import Place, naming_errors

_NUM_CONNECTIONS = 8
#: What is fetched is held next to where it goes.
_MAX_READ_NBYTES = 8 << 20


@contextlib.contextmanager
def opened_file(place: Place) -> Iterator[str | RangedObject]:
    """A path where a caching scheme has made a copy."""
    with contextlib.ExitStack() as exit_stack:
        with naming_errors(place.url):
            file = exit_stack.enter_context(contextlib.closing(_open(place)))
        copy = _path_of_copy(file)
        yield FileObject(file, place.url, _pinned(file, place.fs)) if copy is None else copy


class FileObject(RangedObject):
    """See :class:`~statedict_io.remote.ranges.RangedObject`."""

    mtime_ns = None
    num_connections = _NUM_CONNECTIONS
    max_read_nbytes = _MAX_READ_NBYTES

    def __init__(self, file: Any, url: str, version: str | None = None) -> None:
        self.name, self.version = url, version
        self._fetch: Callable[[int, int], bytes] = _fetcher(file)
        with naming_errors(url):
            self.nbytes = _nbytes_of(file)
        self._edge_lock = threading.Lock()
        self._edges: dict[int, bytes] = {}  # by their offset

    def edge_at(self, offset: int, nbytes: int) -> tuple[int, bytes] | None:
        for start, end in ((0, HEAD_NBYTES), (self.nbytes - TAIL_NBYTES, self.nbytes)):
            start, end = max(start, 0), min(end, self.nbytes)
            if start <= offset < end:
                with self._edge_lock:
                    if start not in self._edges:
                        if nbytes > end - start:
                            return None
                        self._edges[start] = self._fetched(start, end)
                    return start, self._edges[start]
        return None

    def fetch(self, offset: int, end: int, scatter: Scatter, interrupt: Interrupt) -> None:
        data = self._fetched(offset, end)
        if interrupt.begin_writing():
            scatter.write(data)

    def _fetched(self, start: int, end: int) -> bytes:
        data = self._fetch(start, end)
        if len(data) != end - start:
            raise EOFError
        return data


def _open(place: Place) -> Any:
    from fsspec.implementations.cached import CachingFileSystem

    with contextlib.suppress(AttributeError):
        place.fs.invalidate_cache(place.path)  # of listings, which may know another size
    # A caching scheme has one of its own.
    options = {} if isinstance(place.fs, CachingFileSystem) else {"cache_type": "none"}
    return place.fs.open(place.path, "rb", **options)


def _pinned(file: Any, fs: Any) -> str | None:
    """The generation of an object of Google Storage, which from now on all ranges are of; None where gcsfs is not to
    know of generations (``version_aware``), or it is another store."""
    details = getattr(file, "details", None)
    generation = details.get("generation") if isinstance(details, dict) else None
    if not generation or not getattr(fs, "version_aware", False):
        return None
    if "#" not in file.path:
        file.path = f"{file.path}#{generation}"  # as gcsfs spells it
    return str(generation)


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
