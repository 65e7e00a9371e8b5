"""Safetensors files that nobody's save_file wrote: kind -> bytes. What the safetensors package makes of each is asked
of it; ``OURS_ALONE`` are those that it reads and we refuse."""

import json

from corpus_case import Corpus

HEADERS = Corpus()
OURS_ALONE = {
    "a name twice",
    "a name twice, in one place",
    "a metadata key twice",
    "a name of 100,000 characters",
    "too many ones",
}
DATA = bytes(range(1, 25))
W = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def file_of(header, data=DATA, length=None):
    """``header``: its JSON, or what to make it of."""
    if not isinstance(header, (bytes, str)):
        header = json.dumps(header)
    text = header.encode(errors="surrogatepass") if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(data=DATA, **fields):
    return file_of({"w": {**W, **fields}}, data)


def add(kind, content):
    HEADERS.add(kind, lambda: content)


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ENTRY = json.dumps(W)

add("sound", one())
add("no tensors", file_of({}, b""))
add("no tensors, and bytes", file_of({}, b"x"))
add("a scalar", file_of({"w": entry("F32", [], 0, 4)}, DATA[:4]))
add("spaces around", file_of(f'\n {{ "w" :\t{ENTRY} }}  '))
add("a field more", one(note={"by": [1, None, True, "x", -1.5e3]}))
add("fields in another order", file_of({"w": dict(reversed(W.items()))}))
add("fields as a list", file_of({"w": ["F32", [2, 3], [0, 24]]}))
add("escapes", file_of(f'{{"\\u0077\\ud83d\\ude00\\n":{ENTRY.replace("F32", chr(92) + "u0046" + "32")}}}'))
add("metadata", file_of({"__metadata__": {"format": "pt", "": "é"}, "w": W}))
add("metadata like a tensor", file_of({"__metadata__": {"dtype": "F32", "shape": "x"}, "w": W}))
add("metadata null", file_of({"__metadata__": None, "w": W}))
add("empty tensors between", file_of({"a": entry("F32", [0], 0, 0), "w": W, "b": entry("I64", [2, 0], 24, 24)}))
add("in another order than the file", file_of({"b": entry("U8", [20], 4, 24), "a": entry("F32", [1], 0, 4)}))
add("not aligned", file_of({"a": entry("U8", [1], 0, 1), "b": entry("F32", [5], 1, 21), "c": entry("U8", [3], 21, 24)}))
for dtype, nbytes in {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "I16": 2,
    "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}.items():  # fmt: skip
    data = bytes([1, 0] * 12) if dtype == "BOOL" else DATA
    add(f"dtype {dtype}", one(data, dtype=dtype, shape=[24 // nbytes]))
add("sub-byte F4", one(dtype="F4", shape=[6, 8]))
add("sub-byte F4, half a pair", one(dtype="F4", shape=[16, 3]))
add("sub-byte F4, half a byte", one(dtype="F4", shape=[47]))
add("sub-byte F4, a scalar", file_of({"w": entry("F4", [], 0, 1)}, b"x"))
add("sub-byte F6_E2M3", one(dtype="F6_E2M3", shape=[32]))
add("sub-byte F6_E3M2", one(dtype="F6_E3M2", shape=[4, 8]))
add("sub-byte F6, not whole bytes", one(dtype="F6_E3M2", shape=[31]))
add("a shape with 0", file_of({"w": entry("F32", [3, 0, 1 << 40], 0, 0)}, b""))
add("a shape with 0 and 2**63", file_of({"w": entry("F32", [0, 1 << 63], 0, 0)}, b""))
add("a shape with 0 and a product beyond", file_of({"w": entry("F32", [0, 1 << 40, 1 << 40], 0, 0)}, b""))

add("an empty file", b"")
add("seven bytes", b"1234567")
add("no header", file_of(b"", b""))
for length in (0, 1, 1000, 100_000_001, (1 << 63) - 1, (1 << 64) - 1):
    add(f"a header of {length} bytes, it says", file_of(b"{}", b"", length=length))
add("a byte too few", one(DATA[:-1]))
add("a byte behind", one(DATA + b"x"))
add("no data", one(b""))
add("a NUL behind the header", file_of(f'{{"w":{ENTRY}}}\0'))
add("a byte order mark", file_of(b"\xef\xbb\xbf" + f'{{"w":{ENTRY}}}'.encode()))
add("not UTF-8", file_of(f'{{"w":{ENTRY}}}'.encode().replace(b'"w"', b'"\xff\xfe"')))
add("not UTF-8, among the fields", file_of(f'{{"w":{ENTRY}}}'.encode().replace(b'"F32"', b'"F\xff32"')))
add("half of a surrogate pair", file_of(f'{{"w\\ud83d":{ENTRY}}}'))
add("half of a surrogate pair, among the fields", file_of(f'{{"w":{ENTRY[:-1]},"x":"\\ud83d"}}}}'))
add("a control character", file_of(f'{{"w\n":{ENTRY}}}'))
add("an array", file_of("[]", b""))
add("a number", file_of("1", b""))
add("cut off", file_of(f'{{"w":{ENTRY[:-5]}'))
add("a comma too many", file_of(f'{{"w":{ENTRY},}}'))
add("a name twice", file_of(f'{{"w":{json.dumps(entry("F32", [1], 0, 4))},"w":{ENTRY}}}'))
add("a name twice, in one place", file_of(f'{{"w":{ENTRY},"w":{ENTRY}}}'))
add("a field twice", file_of(f'{{"w":{ENTRY[:-1]},"dtype":"F32"}}}}'))
add("a field more, twice", file_of(f'{{"w":{ENTRY[:-1]},"x":1,"x":2}}}}'))
add("metadata twice", file_of(f'{{"__metadata__":{{}},"__metadata__":{{}},"w":{ENTRY}}}'))
add("a metadata key twice", file_of(f'{{"__metadata__":{{"a":"1","a":"2"}},"w":{ENTRY}}}'))
for value in (1, None, ["x"], {"a": "b"}, True):
    add(f"metadata not a string: {value}", file_of({"__metadata__": {"a": value}, "w": W}))
for value in ([], "x", 1):
    add(f"metadata {value!r}", file_of({"__metadata__": value, "w": W}))
for field in W:
    add(f"no {field}", file_of({"w": {key: value for key, value in W.items() if key != field}}))
    for value in (None, 1, "x", {}, [], [1, 2, 3], [True], [[2]], ["2"], [2.0, 3.0], True):
        add(f"{field} {value!r}", one(**{field: value}))
for value in ("F99", "f32", "", "F32 ", "C128", "I4", "x" * 100_000):
    add(f"dtype {value[:9]!r}, {len(value)}", one(dtype=value))
for text in (
    "-1",
    "-0",
    "02",
    "2e0",
    "2.0",
    "1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    "18446744073709551616",
    "9" * 5000,
):
    name = text if len(text) < 30 else f"{len(text)} digits"
    add(f"shape of {name}", file_of(f'{{"w":{ENTRY.replace("[2, 3]", f"[{text}, 3]")}}}'))
    add(f"offset {name}", file_of(f'{{"w":{ENTRY.replace("[0, 24]", f"[0, {text}]")}}}'))
    add(f"a field more, {name}", file_of(f'{{"w":{ENTRY[:-1]},"x":{text}}}}}'))
for what, begin, end in (
    ("behind the file", 24, 48), ("over the end", 8, 32), ("a gap", 4, 24), ("short", 0, 20), ("long", 0, 25),
    ("negative length", 24, 0), ("2**64 - 1", 0, (1 << 64) - 1), ("wraps around", (1 << 64) - 24, (1 << 64) - 1),
):  # fmt: skip
    add(f"offsets: {what}", one(data_offsets=[begin, end]))
add("overlap", file_of({"a": entry("U8", [16], 0, 16), "b": entry("U8", [16], 8, 24)}))
add("one place for two", file_of({"a": W, "b": W}))
add("a gap between", file_of({"a": entry("U8", [8], 0, 8), "b": entry("U8", [8], 16, 24)}))
add("an empty tensor inside another", file_of({"a": entry("F32", [0], 8, 8), "w": W}))
for shape in ([1 << 32, 1 << 32], [1 << 62, 4], [1 << 61, 2], [(1 << 63) - 1] * 3, [1 << 32, 1 << 32, 0], [3] * 60):
    add(f"product of {shape[:3]} and {len(shape)}", one(shape=shape))
add("many ones", one(shape=[1] * 200 + [6]))
add("too many ones", one(shape=[1] * 5000 + [6]))
for depth in (10, 120, 130, 900, 100_000):
    add(f"{depth} lists deep", file_of(f'{{"w":{"[" * depth}{"]" * depth}}}'))
    add(f"a field more, {depth} lists deep", file_of(f'{{"w":{ENTRY[:-1]},"x":{"[" * depth}{"]" * depth}}}}}'))
    add(f"{depth} objects deep", file_of('{"w":' * depth + "1" + "}" * depth))
add("an empty name", file_of({"": W}))
add("a name of 60,000 characters", file_of({"w" * 60_000: W}))
add("a name of 100,000 characters", file_of({"w" * 100_000: W}))
add("a name that steers a terminal", file_of({"\x1b[2Jw\u202e": W}))
