"""An object written from front to back and sent in parts, several at once.

The writing thread fills buffers, each with a part; a team of threads sends them. Whatever is asked of the store the
team asks: no signal's exception comes up between a request and the note of what it has done.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable
from types import TracebackType

from . import multipart_stores
from .multipart import MultipartUpload, SentPart
from .part_sizes import part_sizes
from .stores import Place, note_discard_failed
from .team import Team


class ParallelUpload:
    """See :class:`~statedict_io.remote.uploads.Upload`; made by ``open_upload``.

    Holds as many buffers as parts are sent at once, and no other copy of the data.
    """

    def __init__(self, place: Place, nbytes: int | None, report: Callable[[int], object] = lambda nbytes: None) -> None:
        sizes = part_sizes(place.fs, nbytes, multipart_stores.limits_of(place))
        is_one_request = nbytes is not None and nbytes <= sizes.at_once_nbytes
        self._place = place
        self._report = report
        self._buffer_nbytes = nbytes if nbytes is not None and is_one_request else sizes.part_nbytes
        self._sizes = sizes
        self._max_num_buffers = 1 if is_one_request else sizes.connections
        self._team = Team(self._max_num_buffers, f"upload {place.url}")
        self._process = os.getpid()
        self._is_over = False
        # The writing thread's own.
        self._filling: mmap.mmap | None = None
        self._nbytes_filled = 0
        self._num_buffers = self._num_parts = 0
        self._nbytes_reported = 0
        # Shared with the team, and changed with its lock held.
        self._idle: list[mmap.mmap] = []
        self._sent: list[SentPart] = []
        self._nbytes_acknowledged = 0
        self._upload: MultipartUpload | None = None
        self._begin_lock = threading.Lock()
        self._stop = threading.Event()
        if not is_one_request and nbytes is not None:
            self._team.give(self._begun)

    def write(self, data: memoryview) -> None:
        data = memoryview(data).cast("B")
        while data:
            if self._filling is not None and self._nbytes_filled == self._part_nbytes():
                self._send()  # not before there is more: what fits into one buffer is sent as a whole
            if self._filling is None:
                self._wait(lambda: bool(self._idle) or self._num_buffers < self._max_num_buffers)
                self._filling = self._taken_buffer()
            end = min(self._nbytes_filled + len(data), self._part_nbytes())
            nbytes = end - self._nbytes_filled
            self._filling[self._nbytes_filled : end] = data[:nbytes]
            self._nbytes_filled = end
            data = data[nbytes:]
        self._wait(lambda: True)

    def flush(self) -> None:
        if self._num_parts:
            self._send()
            self._wait(self._team.is_idle)

    def commit(self) -> None:
        self.flush()
        self._team.give(self._complete if self._num_parts else self._put)
        self._wait(self._team.is_idle)
        self._is_over = True
        self._team.end()

    def __enter__(self) -> ParallelUpload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_over or os.getpid() != self._process:  # a forked child has none of the threads
            return
        self._is_over = True
        self._stop.set()
        try:
            self._team.end(self._abort)
        except Exception as e:
            note_discard_failed(error, e, self._place.url)

    def _part_nbytes(self) -> int:
        """Of the one that is being filled."""
        return min(self._sizes.nbytes_of(self._num_parts + 1), self._buffer_nbytes)

    def _wait(self, is_so: Callable[[], bool]) -> None:
        self._team.wait(is_so, self._report_acknowledged)

    def _report_acknowledged(self) -> None:
        nbytes = self._nbytes_acknowledged
        if nbytes != self._nbytes_reported:
            self._nbytes_reported = nbytes
            self._report(nbytes)

    def _taken_buffer(self) -> mmap.mmap:
        with self._team.changed:
            if self._idle:
                return self._idle.pop()
        self._num_buffers += 1
        return _memory(self._buffer_nbytes)

    def _send(self) -> None:
        if self._filling is None:
            return
        self._num_parts += 1
        number, buffer, nbytes = self._num_parts, self._filling, self._nbytes_filled
        self._filling, self._nbytes_filled = None, 0
        self._team.give(lambda: self._put_part(number, buffer, nbytes))

    # --- what the team does

    def _begun(self) -> MultipartUpload:
        with self._begin_lock:
            if self._upload is None:
                self._upload = multipart_stores.begin(self._place, self._stop)
            return self._upload

    def _put_part(self, number: int, buffer: mmap.mmap, nbytes: int) -> None:
        part = self._begun().put_part(number, memoryview(buffer)[:nbytes])
        with self._team.changed:
            self._sent.append(part)
            self._nbytes_acknowledged += nbytes
            self._idle.append(buffer)

    def _put(self) -> None:
        buffer = b"" if self._filling is None else self._filling
        multipart_stores.put(self._place, memoryview(buffer)[: self._nbytes_filled], stop=self._stop)
        self._nbytes_acknowledged = self._nbytes_filled

    def _complete(self) -> None:
        self._begun().complete(self._sent)

    def _abort(self) -> None:
        if self._upload is not None:
            self._upload.abort()


def _memory(nbytes: int) -> mmap.mmap:
    """That goes back to the system when it is dropped."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
