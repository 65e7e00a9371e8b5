"""Uploads to S3: in parts, or by one request.

Checksums are CRC-32s: of each part, which the store compares with what has arrived before it takes the part, and of the
whole object, made of them. Stores that know of none, or of one of the two, get what they know.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..archive.crc32 import shift
from ..backends.checksum import crc32
from .multipart import PartLimits, SentPart
from .s3_client import client_of, code_of, status_of
from .stores import Place, naming_errors

LIMITS = PartLimits(least_nbytes=5 << 20, most_nbytes=5 << 30, max_num_parts=10_000)

#: How stores refuse a request for something in it that they do not know.
_NOT_KNOWN_STATUSES = {400, 405, 501}


@dataclass(frozen=True)
class _Ticket:
    upload_id: str
    has_checksums: bool  #: of parts
    has_object_checksum: bool


class S3MultipartUpload:
    """See :class:`~statedict_io.remote.multipart.MultipartUpload`."""

    limits = LIMITS

    def __init__(self, place: Place, ticket: _Ticket, stop: threading.Event | None = None) -> None:
        self.ticket = ticket
        self._object = _S3Object(place)
        self._stop = stop or threading.Event()
        self._changed = threading.Condition()
        self._num_under_way = 0
        self._is_over = False

    @classmethod
    def begin(cls, place: Place, stop: threading.Event | None) -> S3MultipartUpload:
        with naming_errors(place.url):
            return cls(place, _begun(_S3Object(place), stop), stop)

    @classmethod
    def join(cls, place: Place, ticket: _Ticket) -> S3MultipartUpload:
        return cls(place, ticket)

    def put_part(self, number: int, data: memoryview) -> SentPart:
        data = memoryview(data).cast("B")
        with self._under_way(), naming_errors(self._object.url):
            crc = crc32(data) if self.ticket.has_checksums else None
            answer = self._object.call(
                "upload_part",
                stop=self._stop,
                UploadId=self.ticket.upload_id,
                PartNumber=number,
                Body=data,
                **_checksum(crc),
            )
            return SentPart(number, len(data), answer["ETag"], crc)

    def complete(self, parts: Iterable[SentPart], *, replace: bool = True) -> None:
        parts = sorted(parts, key=lambda part: part.number)
        crc = _crc32_of_all(parts) if self.ticket.has_object_checksum else None
        with naming_errors(self._object.url):
            is_answered = self._object.commit(
                "complete_multipart_upload",
                _Content(sum(part.nbytes for part in parts), lambda: _etag_of(parts), _checksum(crc)),
                replace=replace,
                stop=self._stop,
                UploadId=self.ticket.upload_id,
                MultipartUpload={"Parts": [_named(part) for part in parts]},
                **_checksum(crc),
                **({} if crc is None else {"ChecksumType": "FULL_OBJECT"}),
            )
        if not is_answered:  # an old object with the same bytes would look like the new one
            with contextlib.suppress(Exception):
                self._object.call("abort_multipart_upload", UploadId=self.ticket.upload_id)
        self._is_over = True

    def stop(self) -> None:
        self._stop.set()

    def abort(self) -> None:
        self.stop()
        with self._changed:
            self._changed.wait_for(lambda: self._num_under_way == 0)
            if self._is_over:
                return
            self._is_over = True
        with naming_errors(self._object.url):
            try:
                self._object.call("abort_multipart_upload", UploadId=self.ticket.upload_id)
            except Exception as e:
                if code_of(e) != "NoSuchUpload":
                    raise

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        with self._changed:
            if self._is_over or self._stop.is_set():
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED), self._object.url)
            self._num_under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_under_way -= 1
                self._changed.notify_all()


def put(place: Place, data: memoryview, *, replace: bool, stop: threading.Event | None) -> None:
    """See ``multipart_stores``."""
    with naming_errors(place.url):
        object_ = _S3Object(place)

        def etag() -> str:
            return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'

        if object_.client.has_checksums:
            checksum = _checksum(crc32(data))
            try:
                content = _Content(len(data), etag, checksum)
                object_.commit("put_object", content, replace=replace, stop=stop, Body=data, **checksum)
                return
            except Exception as e:
                if not _knows_no_checksums(e):
                    raise
        object_.commit("put_object", _Content(len(data), etag, {}), replace=replace, stop=stop, Body=data)
        object_.client.has_checksums = False


@dataclass(frozen=True)
class _Content:
    """By which an object is recognized."""

    nbytes: int
    etag: Callable[[], str]  #: where the store makes it as S3 does
    checksum: dict[str, str]  #: of the whole object; {}: none is known


class _S3Object:
    """Requests about one object."""

    def __init__(self, place: Place) -> None:
        self.url = place.url
        self._fs = place.fs
        self._path = place.path
        self._bucket, self._key, _ = place.fs.split_path(place.path)
        if not self._key:
            raise OSError(errno.EINVAL, "no object is named, only a bucket", place.url)
        self.client = client_of(place.fs)

    def call(self, operation: str, **options: Any) -> dict[str, Any]:
        return self.client.call(operation, Bucket=self._bucket, Key=self._key, **options)

    def commit(self, operation: str, content: _Content, *, replace: bool, **options: Any) -> bool:
        """Sends the request by which the object appears. The result tells whether the store has answered that it has;
        otherwise it was found to be there.

        Raises:
            FileExistsError: as of :meth:`~statedict_io.remote.multipart.MultipartUpload.complete`.
        """
        errors: list[Exception] = []
        is_answered = True
        try:
            self.call(operation, note=errors.append, **({} if replace else {"IfNoneMatch": "*"}), **options)
        except Exception as e:
            is_answered = False
            if not (any(map(_may_have_happened, errors)) and self._is_there(content)):
                if replace:
                    raise
                self._refuse_existing(e)
                if not _is_not_known(e):
                    raise
                return self.commit(operation, content, replace=True, **options)
        self._fs.invalidate_cache(self._path)
        return is_answered

    def _is_there(self, content: _Content) -> bool:
        try:
            found = self.call("head_object", ChecksumMode="ENABLED")
        except Exception:
            return False
        if found["ContentLength"] != content.nbytes:
            return False
        return found["ETag"] == content.etag() or (
            bool(content.checksum)
            and content.checksum.items() <= found.items()
            and found.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT"
        )

    def _refuse_existing(self, error: Exception) -> None:
        """Raises FileExistsError if an object is there, which was not to be replaced."""
        if status_of(error) != 412:
            if status_of(error) != 409 and not _is_not_known(error):
                return
            try:
                self.call("head_object")
            except Exception:
                return
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.url) from error


def _begun(object_: _S3Object, stop: threading.Event | None) -> _Ticket:
    if object_.client.has_checksums:
        try:
            wish = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}
            answer = object_.call("create_multipart_upload", stop=stop, **wish)
            knows = answer.get("ChecksumAlgorithm") == "CRC32"
            return _Ticket(answer["UploadId"], knows, knows and answer.get("ChecksumType") == "FULL_OBJECT")
        except Exception as e:
            if not _knows_no_checksums(e):
                raise
    ticket = _Ticket(object_.call("create_multipart_upload", stop=stop)["UploadId"], False, False)
    object_.client.has_checksums = False
    return ticket


def _may_have_happened(error: Exception) -> bool:
    """Whether the store may have done what was asked of it, although this came of it."""
    status = status_of(error)
    return status is None or (status >= 500 and status != 501)


def _is_not_known(error: Exception) -> bool:
    return status_of(error) in _NOT_KNOWN_STATUSES


def _knows_no_checksums(error: Exception) -> bool:
    """Perhaps: then the same is tried without."""
    return _is_not_known(error) and code_of(error) not in {"BadDigest", "InvalidDigest", "NoSuchUpload"}


def _checksum(crc: int | None) -> dict[str, str]:
    return {} if crc is None else {"ChecksumCRC32": base64.b64encode(crc.to_bytes(4, "big")).decode()}


def _crc32_of_all(parts: Sequence[SentPart]) -> int | None:
    crc, nbytes_after = 0, 0
    for part in reversed(parts):
        if part.crc32 is None:
            return None
        crc ^= shift(part.crc32, nbytes_after)
        nbytes_after += part.nbytes
    return crc


def _named(part: SentPart) -> dict[str, Any]:
    return {"PartNumber": part.number, "ETag": part.etag, **_checksum(part.crc32)}


def _etag_of(parts: Sequence[SentPart]) -> str:
    """S3's: the sum of the sums of the parts. "" where those are no MD5 sums."""
    try:
        sums = b"".join(bytes.fromhex(part.etag.strip('"')) for part in parts)
    except ValueError:
        return ""
    return f'"{hashlib.md5(sums, usedforsecurity=False).hexdigest()}-{len(parts)}"'
