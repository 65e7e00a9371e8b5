"""Safetensors headers are read as json.loads reads them, as far as the format goes."""

import json

import pytest

from statedict_io.formats.safetensors_header import METADATA, TensorFields, entries

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HEADERS = {
    "empty": {},
    "one": {"w": ENTRY},
    "metadata": {"__metadata__": {"format": "pt", "": 'quoted "and" \\ back\u00e9\u0001'}, "w": ENTRY},
    "no metadata": {"__metadata__": {}, "w": ENTRY},
    "names": {'a"b': ENTRY, "\\": ENTRY, "\\\\": ENTRY, "": ENTRY, "\u20ac\n": ENTRY, "x" * 70: ENTRY},
    "other fields": {"w": {**ENTRY, "note": "x", "number": 1.5, "nothing": None, "yes": True}},
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("options", [{}, {"indent": 1}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_sound_headers(name, options):
    text = json.dumps(HEADERS[name], **options).encode()
    expected = [(key, fields if key == METADATA else _fields(**fields)) for key, fields in HEADERS[name].items()]
    assert [*entries(text)] == expected and [*entries(text + b"  ")] == expected


def _fields(dtype, shape, data_offsets, **others):
    return TensorFields(dtype, tuple(shape), *data_offsets)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b"{}x", b"{,}", b'{"a"}', b'{"a":}', b'{"a":1}', b'{"a":[]}', b'{"a":{}',
        b'{"a":{},}', b'{"a":{}"b":{}}', b'{"a":{"b":{}}}', b'{"a":{"b":1,"b":2}}', b'{"a', b'{"a\\":{}}',
        b'{"\xff":{}}', b'{"a\n":{}}', b'{"__metadata__":{"a":1}}', b'{"__metadata__":{"a":{}}}',
        b'{"__metadata__":[]}', b'{"__metadata__":{"a":"b",}}', b'{"a":' + b'{"b":' * 100 + b"1" + b"}" * 101,
        b'{"a":{"b":' + b"[" * 4000 + b"]" * 4000 + b"}}",
    ],
)  # fmt: skip
def test_headers_that_are_none(text):
    with pytest.raises(ValueError):
        for _, fields in entries(text):
            assert isinstance(fields, dict)
