"""Small files that could make a reader do much: name -> (suffix, what makes the bytes of the file)."""

import io
import pickle
import struct
import zipfile
import zlib

from corpus_case import Corpus

PROTO, STOP = b"\x80\x02", b"."
CALL = b"ccollections\nOrderedDict\n"


def put(index):
    return b"r" + struct.pack("<I", index)


def get(index):
    return b"j" + struct.pack("<I", index)


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def doubled(levels, make=b"\x86", first=b")"):
    """A pair of one and the same pair of ..., 2**levels in all."""
    return first + b"".join(put(i) + get(i) + make for i in range(levels))


def doubled_containers(levels, of=b"K\x01"):
    """The same with lists."""
    return of + put(0) + b"".join(b"](" + get(i) + get(i) + b"e" + put(i + 1) for i in range(levels))


def doubled_names(levels):
    """Dictionaries in each other, under two keys: 2**levels paths, of which many are spelled alike, to one tensor."""
    return (
        tensor()
        + put(100)
        + b"".join(
            b"}(" + text("x") + get(100 + i) + text("x.x") + get(100 + i) + b"u" + put(101 + i) for i in range(levels)
        )
    )


def set_of(*elements):
    return b"c__builtin__\nset\n](" + b"".join(elements) + b"e\x85R"


def nested(levels, first=b")"):
    return first + b"\x85" * levels


def as_key(key):
    return b"}" + key + b"K\x01s"


def tensor(numel=4, size=(4,), stride=(1,), key="0", kind=b"FloatStorage"):
    """A call as ``torch.save`` writes it."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\n" + kind + b"\n" + text(key)
        + text("cpu") + integer(numel) + b"tQK\x00(" + b"".join(map(integer, size)) + b"t("
        + b"".join(map(integer, stride)) + b"t\x89" + CALL + b")RtR"
    )  # fmt: skip


def archive(data_pkl, *, compressed=False, damaged=True, payload=bytes(range(1, 17))):
    """A file with one storage. Where it is damaged, its checksum is wrong: whoever checks it will look for names."""
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method) as out:
        for name, content in {"data.pkl": data_pkl, "byteorder": b"little", "version": b"3\n"}.items():
            out.writestr(f"model/{name}", content)
        out.writestr("model/data/0", payload, zipfile.ZIP_STORED)
    data = file.getvalue()
    if damaged:
        crc = struct.pack("<I", zlib.crc32(payload))
        data = data.replace(crc, struct.pack("<I", zlib.crc32(payload) ^ 1))
    return data


def empty_records(count):
    """Written by hand, in a second."""
    names = [b"model/data.pkl", b"model/version", *(b"model/data/%d" % i for i in range(count))]
    contents = [PROTO + b"}.", b"3\n"]
    parts, directory, offset = [], [], 0
    for index, name in enumerate(names):
        content = contents[index] if index < len(contents) else b""
        fields = struct.pack("<HHHIIIHH", 0, 0, 0, zlib.crc32(content), len(content), len(content), len(name), 0)
        parts += [b"PK\x03\x04\x0a\0" + fields, name, content]
        directory += [b"PK\x01\x02\x0a\0\x0a\0" + fields + struct.pack("<HHHII", 0, 0, 0, 0, offset), name]
        offset += 30 + len(name) + len(content)
    nbytes = sum(map(len, directory))
    end = offset + nbytes
    zip64 = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, len(names), len(names), nbytes, offset)
    tail = [b"PK\x06\x06" + zip64, b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1)]
    tail += [b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, nbytes, offset, 0)]
    return b"".join(parts + directory + tail)


def safetensors(header, payload=b""):
    return struct.pack("<Q", len(header)) + header + payload


HOSTILE_PICKLES = Corpus()


def _pickle(name, *values, **options):
    HOSTILE_PICKLES.add(name, lambda: (".pt", archive(b"".join([PROTO, *values, STOP]), **options)))


def _entry(value):
    return b"}" + text("w") + value + b"s"


_PLACES = {
    "key": as_key,
    "key of an OrderedDict": lambda value: CALL + b")R" + value + b"K\x01s",
    "key inside a call": lambda value: CALL + b"]" + value + b"K\x01\x86a\x85R",
    "element of a set": lambda value: b"c__builtin__\nset\n]" + value + b"a\x85R",
    "argument": lambda value: CALL + value + b"R",
    "argument in a tuple": lambda value: CALL + value + b"\x85R",
    "argument of new": lambda value: CALL + value + b"\x81",
    "argument of a refused function": lambda value: b"cno\nfunction\n" + value + b"\x85R",
    "function": lambda value: value + b")R",
    "class": lambda value: value + b")\x81",
    "state": lambda value: CALL + b")R" + value + b"b",
    "storage": lambda value: value + b"Q",
    "name of a storage": lambda value: b"(" + text("storage") + b"ctorch\nFloatStorage\n" + value + b"K\x00K\x00tQ",
    "value": lambda value: _entry(value),
}
for _where, _place in _PLACES.items():
    _pickle(f"doubled tuples as a {_where}", _place(doubled(64)))
    _pickle(f"tuples nested 5,000 times as a {_where}", _place(nested(5_000)))
for _where in ("key", "element of a set", "argument in a tuple"):
    _pickle(f"tuples nested 150,000 times as a {_where}", _PLACES[_where](nested(150_000)))
    _pickle(f"doubled tuples, but for a persistent id, as a {_where}", _PLACES[_where](doubled(64, first=b"K\x07Q")))
_pickle("a key of 20 doublings of one long string", as_key(doubled(20, first=text("x" * 1000))))
_pickle("doubled lists in a tuple as a key", b"}" + doubled_containers(64) + b"\x85" + tensor() + b"s")
_pickle("20,000 keys that are each a long tuple", b"}(" + nested(900) + put(0) + b"".join(
    b"(" + get(0) + b"M" + struct.pack("<H", i % 60000) + b"tN" for i in range(20_000)) + b"u")  # fmt: skip
_pickle("integers of one hash", b"}(" + b"".join(
    integer(i * (2**61 - 1)) + b"N" for i in range(1, 60_000)) + b"u")  # fmt: skip
_pickle("integers of one hash in tuples", b"}(" + b"".join(
    integer(i * (2**61 - 1)) + b"\x85N" for i in range(1, 60_000)) + b"u")  # fmt: skip

for _kind, _first in {"tensors": tensor(), "numbers": b"K\x01"}.items():
    _pickle(f"doubled lists of {_kind}", _entry(doubled_containers(64, of=_first)))
    _pickle(f"22 doublings of lists of {_kind}", _entry(doubled_containers(22, of=_first)))
    _pickle(f"doubled tuples of {_kind}", _entry(doubled(64, first=_first)))
    _pickle(f"lists nested 30,000 times around {_kind}", _entry(b"]" * 30_000 + _first + b"a" * 30_000))
    _pickle(f"lists nested 900 times around {_kind}", _entry(b"]" * 900 + _first + b"a" * 900))
    _pickle(f"dictionaries nested 2,000 times around {_kind}",
        _entry((b"}" + text("k")) * 2000 + _first + b"s" * 2000))  # fmt: skip
    _pickle(f"a long key above 10,000 {_kind}", b"}" + text("x" * 100_000) + b"](" + _first + put(7)
        + get(7) * 10_000 + b"es")  # fmt: skip
    _pickle(f"20,000 {_kind} 900 levels down", _entry(b"]" * 900 + b"(" + _first + put(7) + get(7) * 20_000 + b"e"
        + b"a" * 899))  # fmt: skip
    _pickle(f"a dictionary in itself around {_kind}", b"}" + put(1) + text("k") + get(1) + b"s" + text("v") + _first
        + b"s")  # fmt: skip
for _levels in (12, 14, 64):
    _pickle(f"names that clash, doubled {_levels} times", doubled_names(_levels))
for _kind, _first in {"tensors": tensor(), "numbers": b"K\x01"}.items():
    _pickle(f"60,000 names of one set of {_kind}", b"](" + set_of(_first, *(
        b"M" + struct.pack("<H", 1000 + i) for i in range(1000))) + put(7) + get(7) * 60_000 + b"e")  # fmt: skip
    _pickle(f"200 sets that share a tuple of {_kind}", _first + put(7) + b"0(" + get(7) * 1000 + b"t" + put(8) + b"0]("
        + b"".join(set_of(get(8), b"K%c" % i) for i in range(200)) + b"e")  # fmt: skip
    _pickle(f"60,000 sets of {_kind}", _first + put(7) + b"0c__builtin__\nset\n" + put(8) + b"0](" + get(7) + b"e\x85"
        + put(9) + b"0](" + (get(8) + get(9) + b"R") * 60_000 + b"e")  # fmt: skip
    _pickle(f"a set of a tuple of 900 levels around {_kind}", set_of(nested(900, first=_first)))
_pickle("a list of itself", b"]" + put(1) + b"(" + get(1) * 1000 + b"e")
_pickle("a long name", b"}" + text("x" * 10_000_000) + tensor() + b"s")
_pickle("a storage with a long name", _entry(tensor(key="x" * 10_000_000)))
_pickle("a refused global with a long name", b"cno\n" + b"x" * 1_000_000 + b"\n")
_pickle("30,000 calls of a refused function", b"cno\nfunction\n" + b")R" * 30_000)
_pickle("refused functions that add up", b"".join(b"cno\nf%d\n" % i + put(i) for i in range(1000)) + b"("
    + b"".join(get(i) for i in range(1000)) + b"t" + put(1000) + b"](" + (get(0) + get(1000) + b"R") * 10_000
    + b"e")  # fmt: skip
_pickle("an integer of a megabyte", as_key(b"\x8b" + struct.pack("<I", 1 << 20) + b"\x55" * (1 << 20)))
_pickle("an integer in digits", as_key(b"I" + b"7" * 1_000_000 + b"\n"))
_pickle("60,000 entries of the memo", b"](" + b"".join(b"N" + put(i) for i in range(60_000)) + b"e")
_pickle("entries of the memo far apart", b"N" + b"".join(put(i << 16) for i in range(1 << 15)))
_pickle("60,000 marks", b"(" * 60_000)
_pickle("60,000 empty dictionaries", b"](" + b"}" * 60_000 + b"e")
_pickle("60,000 empty tuples in tuples", b"](" + b")\x85" * 60_000 + b"e")
_pickle("20,000 calls", b"](" + CALL + put(0) + (get(0) + b")R") * 20_000 + b"e")
_pickle("a string that says it is long", b"X\xff\xff\xff\x7fabc")

_pickle("a tensor that repeats one element 2**30 times", _entry(tensor(size=(1 << 30,), stride=(0,))))
_pickle("a matrix that repeats one row 2**28 times", _entry(tensor(size=(1 << 28, 4), stride=(0, 1))))
_pickle("a tensor that repeats one element 2**60 times",
    _entry(tensor(size=(1 << 30, 1 << 30), stride=(0, 0))))  # fmt: skip
_LARGE = tensor(size=(1 << 31,), stride=(0,))
_pickle("a large tensor as arguments", CALL + _LARGE + b"R")
_pickle("a large tensor as the argument of a container", CALL + _LARGE + b"\x85R")
_pickle("a large tensor as arguments, known from an entry", b"}" + text("w") + _LARGE + put(9) + b"s0" + CALL
    + get(9) + b"R")  # fmt: skip
_pickle("a large tensor as a state", tensor() + _LARGE + b"b")
_pickle("1000 views of 2**24 elements", b"](" + b"".join(
    tensor(size=(1 << 24,), stride=(0,)) for _ in range(1000)) + b"e", damaged=False)  # fmt: skip
_pickle("overlapping windows", _entry(tensor(numel=1 << 20, size=(1 << 10, 1 << 19), stride=(1, 1))),
    payload=b"\x01" * (4 << 20))  # fmt: skip
_pickle("a compressed tensor, repeated", _entry(tensor(numel=1 << 18, size=(1 << 10, 1 << 18), stride=(0, 1))),
    payload=b"\x01" * (1 << 20), compressed=True)  # fmt: skip
_pickle("data.pkl of 100 megabytes, compressed", _entry(text("x" * 100_000_000)), compressed=True)
_pickle("data.pkl of a million opcodes, compressed", b"](" + b"N" * 1_000_000 + b"e", compressed=True)
_pickle("300,000 dictionaries and what is refused, compressed", b"](" + b"}" * 300_000 + b"e}Nb",
    compressed=True)  # fmt: skip
_pickle("data.pkl of doubled strings", b"](" + text("x" * 1_000_000) + put(1) + get(1) * 20_000 + b"e")

HOSTILE_PICKLES.add("300,000 empty records", lambda: (".pt", empty_records(300_000)))


def _header(name, header, payload=b""):
    HOSTILE_PICKLES.add(f"safetensors: {name}", lambda: (".safetensors", safetensors(header(), payload)))


_header("objects", lambda: b'{"a":[' + b"{}," * 7_000_000 + b"{}]}")
_header("objects as fields", lambda: b'{"a":' + b'{"b":' * 1_000_000 + b"1" + b"}" * 1_000_001)
_header("lists", lambda: b'{"a":' + b"[" * 10_000_000 + b"]" * 10_000_000 + b"}")
_header("numbers", lambda: b'{"a":{"shape":[' + b"1," * 10_000_000 + b"1]}}")
_header("a number", lambda: b'{"a":{"shape":[' + b"1" * 10_000_000 + b"]}}")
_header("tensors without fields", lambda: b"{" + b",".join(b'"%d":{}' % i for i in range(300_000)) + b"}")
_header("a name twice", lambda: b"{" + b",".join([b'"a":{}'] * 1_000_000) + b"}")
_header("metadata", lambda: b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(300_000)) + b"}}")
_header("a string of escapes", lambda: b'{"' + b"\\u0041" * 3_000_000 + b'":{}}')
_header("a string of quotes", lambda: b'{"' + b'\\"' * 5_000_000 + b'":{}}')
_header("space", lambda: b'{"a":' + b" " * 20_000_000 + b"}")
_header("empty tensors", lambda: b"{" + b",".join(
    b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(20_000)) + b"}")  # fmt: skip
