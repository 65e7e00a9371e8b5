"""Ranges of an object of S3, received straight into the memory where they are wanted."""

from __future__ import annotations

import errno
import http.client
import os
import re
from collections.abc import Callable
from typing import Any

from ..system.scattered import Scatter
from . import s3_client
from .interrupts import Interrupt
from .part_sizes import connections_of
from .ranges import HEAD_NBYTES, TAIL_NBYTES, RangedObject
from .side_by_side import perform
from .stores import Place, naming_errors

#: A request for less takes too long for what it brings; more would leave connections idle at the end. A bit above 16
#: MiB, so that what is around a GiB of tensors does not take a round more.
MAX_READ_NBYTES = 17 << 20
#: Interruptible so often; and what is smaller is copied together.
_STEP_NBYTES = 1 << 20
_SMALL_NBYTES = 64 << 10

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_NUM_OPENINGS = 5


class S3Object(RangedObject):
    """See :class:`~statedict_io.remote.ranges.RangedObject`. Opened by one round trip: two requests, for its beginning
    and its end.

    Every request names the ETag of the version that was opened, and the version too where the file system is to know
    of versions (s3fs: ``version_aware``).

    Raises:
        OSError: what the store reported, with the URL.
    """

    max_read_nbytes = MAX_READ_NBYTES

    def __init__(self, place: Place) -> None:
        self.name = place.url
        self._fs = place.fs
        self._bucket, self._key, self._version_id = place.fs.split_path(place.path)
        self.num_connections = connections_of(place.fs)
        self._matches = not getattr(place.fs, "local_expiry_check", False)  # with stores that know no If-Match
        with naming_errors(place.url):
            if not self._key:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), place.url)
            for _ in range(_NUM_OPENINGS):
                head, tail = _Edge(self, f"bytes=0-{HEAD_NBYTES - 1}"), _Edge(self, f"bytes=-{TAIL_NBYTES}")
                perform([head, tail], 2)
                if head.etag == tail.etag:
                    break
            else:
                raise OSError(errno.EBUSY, "the object is replaced all the time", place.url)
        self.nbytes, self.version, self.mtime_ns = tail.nbytes_of_object, tail.etag or None, tail.mtime_ns
        if getattr(place.fs, "version_aware", False):
            self._version_id = self._version_id or tail.version_id
        self._edges = [(tail.start, tail.data)] if tail.start == 0 else [(0, head.data), (tail.start, tail.data)]

    def edge_at(self, offset: int, nbytes: int) -> tuple[int, bytes] | None:
        for start, data in self._edges:
            if start <= offset < start + len(data):
                return start, data
        return None

    def fetch(self, offset: int, end: int, scatter: Scatter, interrupt: Interrupt) -> None:
        begin = offset - scatter.nbytes_done

        def attempt() -> None:
            position = begin + scatter.nbytes_done  # what came before a connection broke is there
            answer = self._get(f"bytes={position}-{end - 1}", interrupt, pinned=True)
            with _Body(answer) as body:
                if _range_of(answer) != (position, end, self.nbytes):
                    raise OSError(errno.EOPNOTSUPP, "the store does not answer requests for ranges", self.name)
                if self.version is not None and answer.get("ETag") != self.version:
                    raise self._replaced()
                if interrupt.begin_writing():
                    _receive(body, scatter, end - position, interrupt)
                interrupt.uses(None)  # before others get the connection

        try:
            self._repeated(attempt, interrupt)
        finally:
            interrupt.is_writing = False

    def repeated_get(self, ranges: str, interrupt: Interrupt, take: Callable[[Any, _Body], None]) -> None:
        """``take`` is given the answer and its body, again and again until it does not fail."""

        def attempt() -> None:
            answer = self._get(ranges, interrupt, pinned=False)
            with _Body(answer) as body:
                take(answer, body)

        self._repeated(attempt, interrupt)

    def head(self, interrupt: Interrupt) -> Any:
        return self._client().call("head_object", stop=interrupt, **self._parameters(pinned=False))

    def _get(self, ranges: str, interrupt: Interrupt, *, pinned: bool) -> Any:
        try:
            return self._client().call("get_object", stop=interrupt, Range=ranges, **self._parameters(pinned=pinned))
        except Exception as e:
            if pinned and (s3_client.status_of(e) == 412 or s3_client.code_of(e) in ("NoSuchKey", "NoSuchVersion")):
                raise self._replaced() from e
            raise

    def _parameters(self, *, pinned: bool) -> dict[str, Any]:
        found = {"Bucket": self._bucket, "Key": self._key}
        if self._version_id:
            found["VersionId"] = self._version_id
        if pinned and self._matches and self.version is not None:
            found["IfMatch"] = self.version
        return found

    def _client(self) -> s3_client.S3Client:
        return s3_client.client_of(self._fs)  # each time: a forked process has another one

    def _repeated(self, attempt: Callable[[], None], interrupt: Interrupt) -> None:
        """For what goes wrong while an answer comes in; requests without an answer are repeated by the client."""
        num_attempts = self._client().num_attempts
        for number in range(num_attempts):
            try:
                return attempt()
            except (ConnectionError, TimeoutError, http.client.HTTPException) as e:
                if number + 1 == num_attempts or interrupt.is_set():
                    raise ConnectionError(errno.ECONNABORTED, f"the answer broke off: {e}") from e
            interrupt.wait(s3_client.wait_seconds(number + 1))

    def _replaced(self) -> OSError:
        return OSError(errno.ESTALE, "the object was replaced, or deleted, while it was read", self.name)


class _Edge:
    """The beginning or the end of an object, of whatever version; see
    :class:`~statedict_io.remote.side_by_side.Request`."""

    counted_nbytes = 0

    def __init__(self, source: S3Object, ranges: str) -> None:
        self._source = source
        self._ranges = ranges
        self.nbytes = TAIL_NBYTES
        self.start = self.nbytes_of_object = 0
        self.data = b""
        self.etag = ""
        self.version_id: str | None = None
        self.mtime_ns: int | None = None

    def send(self, interrupt: Interrupt) -> None:
        try:
            self._source.repeated_get(self._ranges, interrupt, self._take)
        except Exception as e:
            if s3_client.status_of(e) != 416:  # an object of no bytes has no range
                raise
            self._note(self._source.head(interrupt), 0, b"", 0)

    def _take(self, answer: Any, body: _Body) -> None:
        found = _range_of(answer)
        if found is None:
            if answer["ContentLength"] > TAIL_NBYTES:
                raise OSError(errno.EOPNOTSUPP, "the store does not answer requests for ranges", self._source.name)
            found = 0, answer["ContentLength"], answer["ContentLength"]
        start, end, nbytes_of_object = found
        data = bytearray(end - start)
        _receive(body, Scatter([memoryview(data)]), len(data), Interrupt())
        self._note(answer, start, bytes(data), nbytes_of_object)

    def _note(self, answer: Any, start: int, data: bytes, nbytes_of_object: int) -> None:
        self.start, self.data, self.nbytes_of_object = start, data, nbytes_of_object
        self.etag, self.version_id = answer.get("ETag", ""), answer.get("VersionId")
        if "LastModified" in answer:
            self.mtime_ns = int(answer["LastModified"].timestamp()) * 10**9

    def finish(self) -> None:
        pass


def _range_of(answer: Any) -> tuple[int, int, int] | None:
    """(begin, end, size of the object) of what is in an answer."""
    match = _RANGE.fullmatch(answer.get("ContentRange", ""))
    return (int(match[1]), int(match[2]) + 1, int(match[3])) if match else None


class _Body:
    """Of an answer. What is not read to its end takes the connection with it."""

    def __init__(self, answer: Any) -> None:
        self._raw = answer["Body"]._raw_stream  # urllib3's: botocore's own reads what it then copies
        found = getattr(self._raw, "_fp", None)
        self._direct = found if isinstance(found, http.client.HTTPResponse) else None

    def __enter__(self) -> _Body:
        return self

    def __exit__(self, *_: object) -> None:
        if self._direct is not None and self._direct.isclosed():  # at its end, and only there
            self._raw.release_conn()
        else:
            self._raw.close()

    def read_into(self, destination: memoryview) -> int:
        """0 at the end."""
        if self._direct is not None:
            return self._direct.readinto(destination)
        from urllib3.exceptions import HTTPError

        try:
            return int(self._raw.readinto(destination))
        except HTTPError as e:
            raise ConnectionError(str(e)) from e


def _receive(body: _Body, scatter: Scatter, nbytes: int, interrupt: Interrupt) -> None:
    """
    Raises:
        ConnectionError: fewer bytes come, or nobody wants them any more.
    """
    while nbytes:
        if interrupt.is_set():
            raise ConnectionAbortedError("interrupted")
        room = scatter.room()
        if len(room) >= min(_SMALL_NBYTES, nbytes):
            taken = body.read_into(room[: min(_STEP_NBYTES, nbytes)])
            scatter.advance(taken)
        else:  # many small pieces
            together = memoryview(bytearray(min(_STEP_NBYTES, nbytes)))
            taken = body.read_into(together)
            scatter.write(together[:taken])
        if taken == 0:
            raise ConnectionResetError(f"{nbytes} bytes are missing")
        nbytes -= taken
