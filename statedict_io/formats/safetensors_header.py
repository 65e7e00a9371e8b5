"""The JSON of a safetensors header, an entry at a time: no value is made that the format has no place for.

``json.loads`` makes objects of up to a hundred times the text's size before anybody can look at them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ..untrusted.limits import (
    MAX_HEADER_ENTRY_NBYTES,
    MAX_HEADER_METADATA_ENTRIES,
    MAX_HEADER_METADATA_NBYTES,
    MAX_HEADER_NAME_NBYTES,
    shown,
)

METADATA = "__metadata__"
_SPACE = re.compile(rb"[ \t\n\r]*")
_PLAIN_NAME = re.compile(rb'[ \t\n\r]*"([^"\\\x00-\x1f]{0,%d})"[ \t\n\r]*:' % MAX_HEADER_NAME_NBYTES)


def entries(header: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each tensor's name with its fields, to be checked. ``METADATA``, where it is there, has strings.

    Raises:
        ValueError: it is no JSON, or not of this form; says at which byte.
    """
    text = _Text(header)
    text.expect(b"{")
    if not text.take(b"}"):
        while True:
            name = text.name()
            yield name, _metadata(text) if name == METADATA else _fields(text, name)
            if text.take(b"}"):
                break
            text.expect(b",")
    text.expect_end()


def _metadata(text: _Text) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if text.take(b"null"):
        return found
    begin = text.at
    text.expect(b"{")
    while not (not found and text.take(b"}")):
        key = text.name()
        if key in found:
            raise text.error(f"{shown(key)!r} is in the metadata twice")
        found[key] = text.string(MAX_HEADER_METADATA_NBYTES)
        if text.at - begin > MAX_HEADER_METADATA_NBYTES or len(found) > MAX_HEADER_METADATA_ENTRIES:
            raise text.error(
                f"more than {MAX_HEADER_METADATA_NBYTES} bytes or {MAX_HEADER_METADATA_ENTRIES} entries of metadata"
            )
        if text.take(b"}"):
            break
        text.expect(b",")
    return found


def _fields(text: _Text, name: str) -> dict[str, Any]:
    """Of a tensor; of whatever types JSON has, but few."""
    begin = text.at
    inner = text.up_to(b"}", MAX_HEADER_ENTRY_NBYTES)
    try:
        # No object is inside it: its text would have ended with that one.
        pairs = json.loads(inner, object_pairs_hook=lambda pairs: pairs)
        fields = dict(pairs)
    except (ValueError, TypeError, RecursionError):
        text.at = begin
        raise text.error(f"tensor {shown(name)!r} has no object of fields") from None
    if len(fields) < len(pairs):
        raise text.error(f"tensor {shown(name)!r} has a field twice")
    return fields


class _Text:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{problem}, at byte {self.at} of the JSON")

    def take(self, token: bytes) -> bool:
        """Whether ``token`` comes next, which is then behind us; so is the space before it."""
        space = _SPACE.match(self._data, self.at)
        assert space is not None
        self.at = space.end()
        if not self._data.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def expect(self, token: bytes) -> None:
        if not self.take(token):
            raise self.error(f"no {token.decode()!r} where one belongs")

    def expect_end(self) -> None:
        self.take(b"")
        if self.at != len(self._data):
            raise self.error("more text behind the end")

    def name(self) -> str:
        """A string, and the colon behind it."""
        plain = _PLAIN_NAME.match(self._data, self.at)
        if plain is not None:
            self.at = plain.end()
            return plain[1].decode()
        name = self.string(MAX_HEADER_NAME_NBYTES)
        self.expect(b":")
        return name

    def string(self, max_nbytes: int) -> str:
        self.expect(b'"')
        begin = end = self.at
        limit = begin + max_nbytes + 1
        while True:
            end = self._data.find(b'"', end, limit)
            if end < 0:
                raise self.error(f"a string without an end, or of more than {max_nbytes} bytes")
            run = end
            while run > begin and self._data[run - 1] == ord("\\"):
                run -= 1
            if (end - run) % 2 == 0:
                break
            end += 1
        self.at = end + 1
        return json.loads(self._data[begin - 1 : end + 1])

    def up_to(self, token: bytes, max_nbytes: int) -> bytes:
        """What comes next, with the first ``token`` as its end."""
        end = self._data.find(token, self.at, self.at + max_nbytes)
        if end < 0:
            raise self.error(f"no {token.decode()!r} within {max_nbytes} bytes")
        begin, self.at = self.at, end + len(token)
        return self._data[begin : self.at]
