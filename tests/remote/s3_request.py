"""What the servers of these tests remember of a request."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import parse_qs, unquote


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, list[str]]
    range: tuple[int, int] | None  #: of a GET, end excluded; (-n, 0) are the last n bytes
    nbytes: int  #: of the body
    crc32: int | None = None  #: of its body, or of the object that it completes, as the client says
    if_match: str | None = None

    @property
    def part(self) -> int | None:
        return int(self.query["partNumber"][0]) if "partNumber" in self.query else None

    @property
    def kind(self) -> str:
        """The S3 action, as far as the tests care."""
        names = {
            ("POST", "uploads"): "create",
            ("POST", "uploadId"): "complete",
            ("PUT", "uploadId"): "part",
            ("DELETE", "uploadId"): "abort",
        }
        for (method, word), name in names.items():
            if self.method == method and word in self.query:
                return name
        return {"PUT": "put", "GET": "get", "HEAD": "head"}.get(self.method, self.method)


def request_of(method: str, path: str, query: str, headers: Callable[[str], str | None]) -> Request:
    """``path`` is decoded, ``query`` is not; ``headers`` are asked in lower case."""
    return Request(
        method,
        path,
        parse_qs(query, keep_blank_values=True),
        _range(headers("range") or ""),
        int(headers("content-length") or 0),
        _crc32(headers("x-amz-checksum-crc32")),
        headers("if-match"),
    )


def request_of_head(head: bytes) -> tuple[Request, dict[str, str]]:
    """Of HTTP/1.1, up to the empty line, with its headers by their names in lower case."""
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    path, _, query = target.partition("?")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return request_of(method, unquote(path), query, headers.get), headers


def _range(header: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"bytes=(\d*)-(\d+)", header)
    if not match:
        return None
    return (int(match[1]), int(match[2]) + 1) if match[1] else (-int(match[2]), 0)


def _crc32(header: str | None) -> int | None:
    return int.from_bytes(base64.b64decode(header), "big") if header and len(header) == 8 else None
