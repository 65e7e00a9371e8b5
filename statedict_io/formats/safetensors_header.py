"""The JSON of a safetensors header, an entry at a time: no value is made that the format has no place for.

``json.loads`` makes objects of up to a hundred times the text's size before anybody can look at them. What is read is
what the safetensors package reads, within the limits of :mod:`~statedict_io.untrusted.limits`, but for names that are
there twice: of those it takes the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..untrusted.limits import (
    MAX_HEADER_ENTRY_NBYTES,
    MAX_HEADER_METADATA_ENTRIES,
    MAX_HEADER_METADATA_NBYTES,
    shown,
)
from .json_text import JSONText, Pairs

METADATA = "__metadata__"


class TensorFields(NamedTuple):
    """What a header says of a tensor; nothing is known yet of whether it fits."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  #: in the bytes behind the header
    end: int


_FIELDS = ("dtype", "shape", "data_offsets")
_MAX_DEPTH = 125  # of a value among the fields of a tensor, as of serde_json with the header and the entry around it
_MAX_UINT = 1 << 64
# As everybody writes them; anything else that is JSON takes longer.
_NUMBER = rb"(?:0|[1-9][0-9]{0,18})"
_USUAL_FIELDS = re.compile(
    rb"""
    \s*\{\s*"dtype"\s*:\s*"([A-Z0-9_]{1,16})"\s*,
    \s*"shape"\s*:\s*\[\s*(N(?:\s*,\s*N){0,99})?\s*\]\s*,
    \s*"data_offsets"\s*:\s*\[\s*(N)\s*,\s*(N)\s*\]\s*\}
    """.replace(b"N", _NUMBER).replace(rb"\s", rb"[ \t\n\r]"),
    re.VERBOSE,
)


def entries(header: bytes) -> Iterator[tuple[str, TensorFields | dict[str, str]]]:
    """Each tensor's name with its fields; ``METADATA``, where it is there, with the strings.

    Raises:
        ValueError: it is no JSON, or not of this form; says at which byte.
    """
    text = JSONText(header)
    text.expect(b"{")
    if not text.take(b"}"):
        while True:
            name = text.name()
            yield name, _metadata(text) if name == METADATA else _fields(text, name)
            if text.take(b"}"):
                break
            text.expect(b",")
    text.expect_end()


def _metadata(text: JSONText) -> dict[str, str]:
    found: dict[str, str] = {}
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


def _fields(text: JSONText, name: str) -> TensorFields:
    usual = text.match(_USUAL_FIELDS)
    if usual is not None:
        dtype, shape, begin, end = usual.groups()
        sizes = () if shape is None else tuple(map(int, shape.split(b",")))
        return TensorFields(dtype.decode(), sizes, int(begin), int(end))
    at = text.at
    value = text.value(MAX_HEADER_ENTRY_NBYTES)
    try:
        return _checked(value)
    except ValueError as e:
        text.at = at
        raise text.error(f"tensor {shown(name)!r} {e}") from None


def _checked(value: Any) -> TensorFields:
    """``value``: what :meth:`JSONText.value` gives, objects as :class:`Pairs`."""
    if type(value) is list and len(value) == len(_FIELDS):  # serde takes a struct's fields in order, too
        value = Pairs(zip(_FIELDS, value, strict=True))
    if not isinstance(value, Pairs):
        raise ValueError("has no object of fields")
    fields: dict[str, Any] = {}
    for field, content in value:
        if field in fields and field in _FIELDS:
            raise ValueError(f"has {field!r} twice")
        fields[field] = content
    if _depth(value) > _MAX_DEPTH:
        raise ValueError(f"has a field that is nested more than {_MAX_DEPTH} deep")
    for field in _FIELDS:
        if field not in fields:
            raise ValueError(f"has no {field!r}")
    dtype, shape, offsets = (fields[field] for field in _FIELDS)
    if not isinstance(dtype, str):
        raise ValueError("has a dtype that is no string")
    for field, numbers in (("shape", shape), ("data_offsets", offsets)):
        if type(numbers) is not list or not all(type(number) is int and 0 <= number < _MAX_UINT for number in numbers):
            raise ValueError(f"has a {field!r} that is no list of integers from 0 to 2**64 - 1")
    if len(offsets) != 2:
        raise ValueError(f"has {len(offsets)} 'data_offsets' in place of two")
    return TensorFields(dtype, tuple(shape), *offsets)


def _depth(value: Any) -> int:
    deepest, pending = 0, [(value, 1)]
    while pending:
        part, depth = pending.pop()
        if isinstance(part, Pairs):
            pending += [(inner, depth + 1) for _, inner in part]
        elif isinstance(part, list):
            pending += [(inner, depth + 1) for inner in part]
        else:
            continue
        deepest = max(deepest, depth)
    return deepest
