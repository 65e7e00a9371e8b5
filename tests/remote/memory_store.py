"""Buckets in memory, as S3 has them; what speaks HTTP is memory_server.py, or any WSGI server.

What it has: buckets, PUT, GET with ranges, HEAD, DELETE, DeleteObjects, ListObjectsV2, multipart uploads with their
lists, If-Match and If-None-Match, and checksums (CRC-32 verified, of parts, objects and FULL_OBJECT at completion; the
other algorithms are kept and returned). ETags are not digests. test_memory_store.py holds it against moto.
"""

from __future__ import annotations

import base64
import bisect
import itertools
import re
import secrets
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import formatdate
from typing import Any
from xml.sax.saxutils import escape

from .s3_answers import Answer, Refusal, parsed, refused, xml
from .s3_request import Request, request_of

LEAST_PART_NBYTES = 5 << 20
ALGORITHMS = ("crc32", "crc32c", "crc64nvme", "sha1", "sha256")
SUBRESOURCES = ("acl", "attributes", "legal-hold", "retention", "tagging", "torrent")


@dataclass
class Part:
    data: memoryview
    checksums: dict[str, str]  #: by algorithm, in base64
    etag: str = field(default_factory=lambda: f'"{secrets.token_hex(16)}"')
    modified: str = field(default_factory=lambda: _now())


@dataclass
class Object:
    parts: list[memoryview]
    etag: str
    checksums: dict[str, str]
    checksum_type: str
    headers: dict[str, str]  #: metadata
    modified: str = field(default_factory=lambda: formatdate(usegmt=True))

    def __post_init__(self) -> None:
        self.ends = list(itertools.accumulate(len(part) for part in self.parts))

    @property
    def nbytes(self) -> int:
        return self.ends[-1] if self.ends else 0

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        index = bisect.bisect_right(self.ends, start)
        while start < end:
            begin = self.ends[index] - len(self.parts[index])
            yield self.parts[index][start - begin : end - begin]
            start = self.ends[index]
            index += 1


@dataclass
class Multipart:
    bucket: str
    key: str
    headers: dict[str, str]
    algorithm: str | None
    checksum_type: str
    parts: dict[int, Part] = field(default_factory=dict)


class MemoryStore:
    """May be asked from several threads. ``verify`` checksums, or trust them. Also a WSGI application."""

    def __init__(self, *, verify: bool = True) -> None:
        self._verify = verify
        self._lock = threading.Lock()
        self._buckets: dict[str, dict[str, Object]] = {}
        self._uploads: dict[str, Multipart] = {}

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        headers = {
            name.removeprefix("HTTP_").lower().replace("_", "-"): value
            for name, value in environ.items()
            if name.startswith("HTTP_") or name == "CONTENT_LENGTH"
        }
        asked = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]
        request = request_of(*asked, headers.get)
        answer = self.answer(request, headers, memoryview(environ["wsgi.input"].read(request.nbytes)))
        start_response(f"{answer.status} {answer.reason}", list(answer.headers_to_send().items()))
        if request.method == "HEAD":
            return []
        return [answer.body.encode()] if answer.pieces is None else (bytes(piece) for piece in answer.pieces)

    def put(self, bucket: str, key: str, data: memoryview) -> None:
        """Without the wire. The bytes stay the caller's, who must not change them."""
        with self._lock:
            self._buckets.setdefault(bucket, {})[key] = Object([data], Part(data, {}).etag, {}, "FULL_OBJECT", {})

    def remove(self, bucket: str, key: str) -> None:
        with self._lock:
            self._buckets[bucket].pop(key, None)

    def object(self, bucket: str, key: str) -> Object | None:
        with self._lock:
            return self._buckets.get(bucket, {}).get(key)

    @property
    def uploads(self) -> int:
        """That were begun, and neither completed nor aborted."""
        return len(self._uploads)

    def answer(self, request: Request, headers: dict[str, str], body: memoryview) -> Answer:
        """``headers`` by their names in lower case. The body becomes the store's: nobody may change it."""
        if "aws-chunked" in headers.get("content-encoding", ""):
            body = _unchunked(body, headers)
        try:
            return self._answer(request, headers, body)
        except Refusal as refusal:
            return refused(refusal.code, request)

    def _answer(self, request: Request, headers: dict[str, str], body: memoryview) -> Answer:
        method, query = request.method, request.query
        bucket, _, key = request.path.lstrip("/").partition("/")
        if not bucket:
            return xml(
                "ListAllMyBucketsResult",
                "<Buckets>{}</Buckets>".format(
                    "".join(f"<Bucket><Name>{escape(name)}</Name></Bucket>" for name in sorted(self._buckets))
                ),
            )
        if not key:
            return self._of_bucket(request, bucket, body)
        if bucket not in self._buckets:
            raise Refusal("NoSuchBucket")
        if method == "POST" and "uploads" in query:
            return self._create(bucket, key, headers)
        if "uploadId" in query:
            action = {"PUT": self._put_part, "POST": self._complete, "DELETE": self._abort, "GET": self._list_parts}
            with self._lock:
                upload = self._uploads.get(query["uploadId"][0])
            if upload is None or (upload.bucket, upload.key) != (bucket, key):
                raise Refusal("NoSuchUpload")
            return action[method](request, headers, body, upload)
        if method == "PUT" and "x-amz-copy-source" not in headers and not any(n in query for n in SUBRESOURCES):
            return self._put(bucket, key, headers, body)
        if method in {"GET", "HEAD"} and not any(n in query for n in SUBRESOURCES):
            return self._get(request, headers, bucket, key)
        if method == "DELETE":
            with self._lock:
                self._buckets[bucket].pop(key, None)
            return Answer(204)
        raise Refusal("NotImplemented")

    def _of_bucket(self, request: Request, bucket: str, body: memoryview) -> Answer:
        method, query = request.method, request.query
        with self._lock:
            if method == "PUT":
                if bucket in self._buckets:
                    raise Refusal("BucketAlreadyOwnedByYou")
                self._buckets[bucket] = {}
                return Answer(headers={"Location": f"/{bucket}"})
            objects = self._buckets.get(bucket)
            if objects is None:
                raise Refusal("NoSuchBucket")
            if method == "HEAD":
                return Answer()
            if method == "DELETE":
                del self._buckets[bucket]
                return Answer(204)
            if method == "GET" and "uploads" in query:
                return _list_uploads(bucket, self._uploads)
            if method == "GET" and "location" in query:
                return xml("LocationConstraint", "")
            if method == "GET":
                return _list_objects(bucket, query, objects)
            if method == "POST" and "delete" in query:
                keys = [found.text or "" for found in parsed(body).iterfind(".//{*}Key")]
                for key in keys:
                    objects.pop(key, None)
                return xml("DeleteResult", "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys))
        raise Refusal("NotImplemented")

    def _put(self, bucket: str, key: str, headers: dict[str, str], body: memoryview) -> Answer:
        part = Part(body, self._checked(headers, body))
        self._appear(bucket, key, headers, Object([body], part.etag, part.checksums, "FULL_OBJECT", _metadata(headers)))
        return Answer(headers={"ETag": part.etag, **_checksum_headers(part.checksums, "FULL_OBJECT")})

    def _get(self, request: Request, headers: dict[str, str], bucket: str, key: str) -> Answer:
        with self._lock:
            found = self._buckets[bucket].get(key)
        if found is None:
            raise Refusal("NoSuchKey")
        if "if-match" in headers and headers["if-match"].strip('"') not in {found.etag.strip('"'), "*"}:
            raise Refusal("PreconditionFailed")
        described = {
            "ETag": found.etag,
            "Last-Modified": found.modified,
            "Accept-Ranges": "bytes",
            "Content-Type": "binary/octet-stream",
            **found.headers,
        }
        if headers.get("if-none-match", "").strip('"') == found.etag.strip('"'):
            return Answer(304, described)
        if headers.get("x-amz-checksum-mode", "").upper() == "ENABLED" and "range" not in headers:
            described.update(_checksum_headers(found.checksums, found.checksum_type))
        start, end, status = 0, found.nbytes, 200
        if "range" in headers:
            start, end = _bounds(headers["range"], found.nbytes)
            status = 206
            described["Content-Range"] = f"bytes {start}-{end - 1}/{found.nbytes}"
        described["Content-Length"] = str(end - start)
        return Answer(status, described, pieces=found.pieces(start, end))

    def _create(self, bucket: str, key: str, headers: dict[str, str]) -> Answer:
        algorithm = headers.get("x-amz-checksum-algorithm")
        algorithm = algorithm and algorithm.lower()
        of_parts = "FULL_OBJECT" if algorithm == "crc64nvme" else "COMPOSITE"
        kind = headers.get("x-amz-checksum-type", of_parts)
        upload_id = secrets.token_urlsafe(32)
        with self._lock:
            self._uploads[upload_id] = Multipart(bucket, key, _metadata(headers), algorithm, kind)
        answer = xml(
            "InitiateMultipartUploadResult",
            f"<Bucket>{escape(bucket)}</Bucket><Key>{escape(key)}</Key><UploadId>{upload_id}</UploadId>",
        )
        if algorithm:
            answer.headers.update({"x-amz-checksum-algorithm": algorithm.upper(), "x-amz-checksum-type": kind})
        return answer

    def _put_part(self, request: Request, headers: dict[str, str], body: memoryview, upload: Multipart) -> Answer:
        number = request.part or 0
        if not 1 <= number <= 10_000:
            raise Refusal("InvalidArgument")
        part = Part(body, self._checked(headers, body))
        with self._lock:
            upload.parts[number] = part
        return Answer(headers={"ETag": part.etag, **_checksum_headers(part.checksums)})

    def _list_parts(self, request: Request, headers: dict[str, str], body: memoryview, upload: Multipart) -> Answer:
        after = int(request.query.get("part-number-marker", ["0"])[0])
        most = int(request.query.get("max-parts", ["1000"])[0])
        with self._lock:
            numbers = sorted(number for number in upload.parts if number > after)
            listed = [(number, upload.parts[number]) for number in numbers[:most]]
        is_cut = len(numbers) > most
        next_marker = listed[-1][0] if listed else 0
        text = (
            f"<Bucket>{escape(upload.bucket)}</Bucket><Key>{escape(upload.key)}</Key>"
            f"<UploadId>{request.query['uploadId'][0]}</UploadId><PartNumberMarker>{after}</PartNumberMarker>"
            f"<NextPartNumberMarker>{next_marker}</NextPartNumberMarker>"
            f"<MaxParts>{most}</MaxParts><IsTruncated>{str(is_cut).lower()}</IsTruncated>"
        )
        for number, part in listed:
            text += (
                f"<Part><PartNumber>{number}</PartNumber><LastModified>{part.modified}</LastModified>"
                f"<ETag>{escape(part.etag)}</ETag><Size>{len(part.data)}</Size>{_checksum_xml(part.checksums)}</Part>"
            )
        return xml("ListPartsResult", text)

    def _complete(self, request: Request, headers: dict[str, str], body: memoryview, upload: Multipart) -> Answer:
        asked = [
            (int(found.findtext("{*}PartNumber") or 0), (found.findtext("{*}ETag") or "").strip('"'), found)
            for found in parsed(body).iterfind("{*}Part")
        ]
        if not asked:
            raise Refusal("MalformedXML")
        if [number for number, _, _ in asked] != sorted({number for number, _, _ in asked}):
            raise Refusal("InvalidPartOrder")
        with self._lock:
            parts = [upload.parts.get(number) for number, _, _ in asked]
        chosen: list[Part] = []
        for part, (_, etag, found) in zip(parts, asked, strict=True):
            if part is None or part.etag.strip('"') != etag:
                raise Refusal("InvalidPart")
            for algorithm in ALGORITHMS:
                said = found.findtext(f"{{*}}Checksum{algorithm.upper()}")
                if said is not None and part.checksums.get(algorithm, said) != said:
                    raise Refusal("InvalidPart")
            chosen.append(part)
        if any(len(part.data) < LEAST_PART_NBYTES for part in chosen[:-1]):
            raise Refusal("EntityTooSmall")
        checksums = self._of_whole(headers, upload, chosen)
        etag = f'"{secrets.token_hex(16)}-{len(chosen)}"'
        whole = Object([part.data for part in chosen], etag, checksums, upload.checksum_type, upload.headers)
        self._appear(upload.bucket, upload.key, headers, whole, request.query["uploadId"][0])
        return xml(
            "CompleteMultipartUploadResult",
            f"<Location>/{escape(upload.bucket)}/{escape(upload.key)}</Location><Bucket>{escape(upload.bucket)}</Bucket>"
            f"<Key>{escape(upload.key)}</Key><ETag>{escape(etag)}</ETag>{_checksum_xml(checksums)}"
            + (f"<ChecksumType>{upload.checksum_type}</ChecksumType>" if checksums else ""),
        )

    def _of_whole(self, headers: dict[str, str], upload: Multipart, parts: list[Part]) -> dict[str, str]:
        """Checksums of the object; those that were promised and do not hold are refused."""
        promised = _given(headers)
        if upload.algorithm == "crc32" and upload.checksum_type == "FULL_OBJECT" and self._verify:
            crc = 0
            for part in parts:
                crc = zlib.crc32(part.data, crc)
            if promised.setdefault("crc32", _base64_crc32(crc)) != _base64_crc32(crc):
                raise Refusal("BadDigest")
        if upload.algorithm and upload.checksum_type == "COMPOSITE":
            of_parts = [part.checksums.get(upload.algorithm) for part in parts]
            if upload.algorithm == "crc32" and None not in of_parts:
                crc = zlib.crc32(b"".join(base64.b64decode(each) for each in of_parts if each))
                promised["crc32"] = f"{_base64_crc32(crc)}-{len(parts)}"
        return promised

    def _abort(self, request: Request, headers: dict[str, str], body: memoryview, upload: Multipart) -> Answer:
        with self._lock:
            self._uploads.pop(request.query["uploadId"][0], None)
        return Answer(204)

    def _appear(self, bucket: str, key: str, headers: dict[str, str], new: Object, upload_id: str = "") -> None:
        with self._lock:
            old = self._buckets[bucket].get(key)
            if old is not None and headers.get("if-none-match") == "*":
                raise Refusal("PreconditionFailed")
            if "if-match" in headers:
                if old is None:
                    raise Refusal("NoSuchKey")
                if old.etag.strip('"') != headers["if-match"].strip('"'):
                    raise Refusal("PreconditionFailed")
            self._buckets[bucket][key] = new
            self._uploads.pop(upload_id, None)

    def _checked(self, headers: dict[str, str], body: memoryview) -> dict[str, str]:
        given = _given(headers)
        if self._verify and "crc32" in given and given["crc32"] != _base64_crc32(zlib.crc32(body)):
            raise Refusal("BadDigest")
        return given


def _list_objects(bucket: str, query: dict[str, list[str]], objects: dict[str, Object]) -> Answer:
    def option(name: str, otherwise: str = "") -> str:
        return query.get(name, [otherwise])[0]

    prefix, delimiter = option("prefix"), option("delimiter")
    after = option("continuation-token") or option("start-after") or option("marker")
    most = int(option("max-keys", "1000"))
    contents, common, last, is_cut = "", [], "", False
    count = 0
    for key in sorted(key for key in objects if key.startswith(prefix)):
        folder = ""
        if delimiter and delimiter in key[len(prefix) :]:
            folder = prefix + key[len(prefix) :].partition(delimiter)[0] + delimiter
        if (folder or key) <= after or folder in common[-1:]:
            continue
        if count == most:
            is_cut = True
            break
        count += 1
        last = folder or key
        if folder:
            common.append(folder)
            continue
        found = objects[key]
        contents += (
            f"<Contents><Key>{escape(key)}</Key><LastModified>{_now()}</LastModified>"
            f"<ETag>{escape(found.etag)}</ETag><Size>{found.nbytes}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )
    text = (
        f"<Name>{escape(bucket)}</Name><Prefix>{escape(prefix)}</Prefix><Delimiter>{escape(delimiter)}</Delimiter>"
        f"<MaxKeys>{most}</MaxKeys><KeyCount>{count}</KeyCount><IsTruncated>{str(is_cut).lower()}</IsTruncated>"
        + (f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if is_cut else "")
        + contents
        + "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in common)
    )
    return xml("ListBucketResult", text)


def _list_uploads(bucket: str, uploads: dict[str, Multipart]) -> Answer:
    text = "".join(
        f"<Upload><Key>{escape(upload.key)}</Key><UploadId>{upload_id}</UploadId></Upload>"
        for upload_id, upload in sorted(uploads.items(), key=lambda item: item[1].key)
        if upload.bucket == bucket
    )
    return xml("ListMultipartUploadsResult", f"<Bucket>{escape(bucket)}</Bucket><IsTruncated>false</IsTruncated>{text}")


def _unchunked(body: memoryview, headers: dict[str, str]) -> memoryview:
    """Of Content-Encoding aws-chunked; checksums in its trailer become headers."""
    data, at = bytearray(), 0
    raw = bytes(body)
    while True:
        line, _, _ = raw[at : at + 200].partition(b"\r\n")
        nbytes = int(line.partition(b";")[0], 16)
        at += len(line) + 2
        if nbytes == 0:
            break
        data += raw[at : at + nbytes]
        at += nbytes + 2
    for line in raw[at:].split(b"\r\n"):
        name, _, value = line.decode("latin-1").partition(":")
        if value:
            headers[name.lower()] = value.strip()
    return memoryview(data)


def _bounds(header: str, nbytes: int) -> tuple[int, int]:
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if not match or not (match[1] or match[2]):
        return 0, nbytes
    if not match[1]:
        start, end = max(nbytes - int(match[2]), 0), nbytes
    else:
        start, end = int(match[1]), min(int(match[2]) + 1, nbytes) if match[2] else nbytes
    if start >= end:
        raise Refusal("InvalidRange")
    return start, end


def _metadata(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("x-amz-meta-")}


def _given(headers: dict[str, str]) -> dict[str, str]:
    names = ((algorithm, f"x-amz-checksum-{algorithm}") for algorithm in ALGORITHMS)
    return {algorithm: headers[name] for algorithm, name in names if name in headers}


def _checksum_headers(checksums: dict[str, str], kind: str = "") -> dict[str, str]:
    found = {f"x-amz-checksum-{algorithm}": value for algorithm, value in checksums.items()}
    return {**found, "x-amz-checksum-type": kind} if found and kind else found


def _checksum_xml(checksums: dict[str, str]) -> str:
    return "".join(f"<Checksum{name.upper()}>{value}</Checksum{name.upper()}>" for name, value in checksums.items())


def _base64_crc32(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
