"""Archives that nobody's torch.save wrote: name -> (bytes of a sound archive) -> damaged bytes.

The archive is the one of `sound_archive`: records stored, not compressed, zip64 end records.
"""

import io
import pickle
import struct
import zipfile

import torch
from corpus_case import Corpus, filled

HOSTILE = Corpus()

_CENTRAL, _LOCAL, _END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"


def sound_object():
    return {f"w{i}": filled(100, seed=i) for i in range(4)} | {"large": filled(1 << 16)}


def sound_archive():
    file = io.BytesIO()
    torch.save(sound_object(), file)
    return file.getvalue()


def _central(data, name):
    """Where the directory's header of a record is."""
    at = data.index(_CENTRAL)
    while not data[at + 46 :].startswith(f"archive/{name}".encode()):
        at = data.index(_CENTRAL, at + 4)
    return at


def _patched(data, *patches):
    data = bytearray(data)
    for at, form, *values in patches:
        struct.pack_into(form, data, at, *values)
    return bytes(data)


def _directory_field(name, offset, form, value):
    return lambda data: _patched(data, (_central(data, name) + offset, form, value))


for _what, _offset in (("stored size", 20), ("size", 24)):
    for _value in (0, 1, 0x7FFFFFFF, 0xFFFFFFFE):
        HOSTILE.add(f"{_what} {_value:#x}", _directory_field("data/0", _offset, "<I", _value))
HOSTILE.add(
    "both sizes 4 GiB", lambda data: _patched(data, (_central(data, "data/0") + 20, "<II", 0xFFFFFFFE, 0xFFFFFFFE))
)
HOSTILE.add("header behind the end", _directory_field("data/0", 42, "<I", 0x7FFFFFFF))
HOSTILE.add(
    "header in another record",
    lambda data: _patched(
        data, (_central(data, "data/0") + 42, "<I", struct.unpack_from("<I", data, _central(data, "data/1") + 42)[0])
    ),
)
HOSTILE.add(
    "header inside a payload",
    lambda data: _patched(
        data,
        (_central(data, "data/1") + 42, "<I", struct.unpack_from("<I", data, _central(data, "data/0") + 42)[0] + 40),
    ),
)
HOSTILE.add("encrypted", _directory_field("data/0", 8, "<H", 1))
HOSTILE.add("unknown method", _directory_field("data/0", 10, "<H", 99))
HOSTILE.add("deflate that is none", _directory_field("data/0", 10, "<H", 8))
HOSTILE.add("disk 7", _directory_field("data/0", 34, "<H", 7))
HOSTILE.add("name longer than the directory", _directory_field("version", 28, "<H", 0xFFFF))
HOSTILE.add("extra longer than the directory", _directory_field("version", 30, "<H", 0xFFFF))
HOSTILE.add("zip64 mark without field", _directory_field("data/0", 20, "<I", 0xFFFFFFFF))


@HOSTILE.case
def duplicate_names(data):
    return data.replace(b"archive/data/1", b"archive/data/0")


@HOSTILE.case
def another_name_in_the_local_header(data):
    return data.replace(b"archive/data/1", b"archive/data/9", 1)


@HOSTILE.case
def local_header_has_another_size(data):
    at = struct.unpack_from("<I", data, _central(data, "data/0") + 42)[0]
    return _patched(data, (at + 18, "<II", 12345, 12345))


@HOSTILE.case
def local_extra_field_reaches_into_the_next_record(data):
    at = struct.unpack_from("<I", data, _central(data, "data/0") + 42)[0]
    return _patched(data, (at + 28, "<H", 0xFFFF))


@HOSTILE.case
def no_local_header(data):
    at = struct.unpack_from("<I", data, _central(data, "data/0") + 42)[0]
    return _patched(data, (at, "<I", 0))


def _zip64_end(data):
    return data.rindex(b"PK\x06\x06")


for _what, _offset in (("count", 24), ("count of all", 32), ("directory size", 40), ("directory offset", 48)):
    for _value in (0xFFFF, 1 << 40, (1 << 64) - 1, (1 << 63) + 1):
        HOSTILE.add(
            f"zip64 {_what} {_value:#x}",
            lambda data, o=_offset, v=_value: _patched(data, (_zip64_end(data) + o, "<Q", v)),
        )


@HOSTILE.case
def counts_that_agree_on_a_lie(data):
    end, at = data.rindex(_END), _zip64_end(data)
    return _patched(data, (at + 24, "<QQ", 1 << 30, 1 << 30), (end + 8, "<HH", 0xFFFF, 0xFFFF))


@HOSTILE.case
def fewer_records_than_there_are(data):
    end, at = data.rindex(_END), _zip64_end(data)
    return _patched(data, (at + 24, "<QQ", 2, 2), (end + 8, "<HH", 2, 2))


@HOSTILE.case
def locator_behind_the_end(data):
    return _patched(data, (data.rindex(b"PK\x06\x07") + 8, "<Q", (1 << 64) - 8))


@HOSTILE.case
def zip64_sizes_that_wrap_around(data):
    """Offset + size is small again in 64 bits."""
    at = _central(data, "data/0")
    name_nbytes = struct.unpack_from("<H", data, at + 28)[0]
    extra = struct.pack("<HHQQQ", 1, 24, (1 << 64) - 200, (1 << 64) - 200, 300)
    patched = _patched(
        data, (at + 20, "<II", 0xFFFFFFFF, 0xFFFFFFFF), (at + 30, "<H", len(extra)), (at + 42, "<I", 0xFFFFFFFF)
    )
    return _grown(patched, at + 46 + name_nbytes, extra)


@HOSTILE.case
def zip64_field_cut_off(data):
    at = _central(data, "data/0")
    name_nbytes = struct.unpack_from("<H", data, at + 28)[0]
    patched = _patched(data, (at + 20, "<II", 0xFFFFFFFF, 0xFFFFFFFF), (at + 30, "<H", 8))
    return _grown(patched, at + 46 + name_nbytes, struct.pack("<HHI", 1, 4, 5))


def _grown(data, at, more):
    """`more` put into the directory at `at`, the end records corrected."""
    data = data[:at] + more + data[at:]
    zip64, locator, end = _zip64_end(data), data.rindex(b"PK\x06\x07"), data.rindex(_END)
    size = struct.unpack_from("<Q", data, zip64 + 40)[0] + len(more)
    return _patched(data, (zip64 + 40, "<Q", size), (locator + 8, "<Q", zip64), (end + 12, "<I", size))


HOSTILE.add("cut in the middle", lambda data: data[: len(data) // 2])
HOSTILE.add("cut before the end record", lambda data: data[:-22])
HOSTILE.add("cut in the end record", lambda data: data[:-5])
HOSTILE.add("the start alone", lambda data: data[:4])
HOSTILE.add("a local header alone", lambda data: data[:64])
HOSTILE.add("the end record alone", lambda data: _LOCAL + data[-22:])
HOSTILE.add("twice the same file", lambda data: data + data)
HOSTILE.add("bytes before the archive", lambda data: _LOCAL + b"xyz" * 100 + data)


def _zipped(records, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def _bomb(numel, payload, *, declared=None):
    """A pickle that asks for `numel` bytes of data/0."""
    reference = _tensor_pickle(numel, numel)
    data = _zipped({"data.pkl": reference, "data/0": payload, "version": "3\n"}, zipfile.ZIP_DEFLATED)
    if declared is not None:
        data = _patched(data, (_central(data, "data/0") + 24, "<I", declared))
    return data


def _tensor_pickle(storage_numel, size, stride=1):
    """data.pkl of one uint8 tensor, with any numbers in it."""

    def integer(n):
        return pickle.LONG1 + bytes([len(pickle.encode_long(n))]) + pickle.encode_long(n)

    def text(s):
        return pickle.BINUNICODE + struct.pack("<I", len(s)) + s

    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((" + text(b"storage") + b"ctorch\nByteStorage\n" + text(b"0")
        + text(b"cpu") + integer(storage_numel) + b"tQ" + integer(0) + integer(size) + b"\x85" + integer(stride)
        + b"\x85\x89ccollections\nOrderedDict\n)RtR."
    )  # fmt: skip


for _numel in (1 << 20, 1 << 40, (1 << 61) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) + 5, 1 << 70, -1, -(1 << 63)):
    HOSTILE.add(
        f"storage of {_numel:#x} elements",
        lambda _, n=_numel: _zipped({"data.pkl": _tensor_pickle(n, 5), "data/0": b"12345", "version": "3\n"}),
    )
    if _numel >= 0:
        HOSTILE.add(
            f"tensor of {_numel:#x} elements",
            lambda _, n=_numel: _zipped({"data.pkl": _tensor_pickle(5, n), "data/0": b"12345", "version": "3\n"}),
        )
HOSTILE.add(
    "tensor with a huge stride",
    lambda _: _zipped({"data.pkl": _tensor_pickle(5, 5, 1 << 40), "data/0": b"12345", "version": "3\n"}),
)
HOSTILE.add("inflates to more than declared", lambda _: _bomb(1000, b"\0" * (64 << 20), declared=1000))
HOSTILE.add("declares more than it inflates to", lambda _: _bomb(1000000, b"\0" * 1000, declared=1000000 % 1032))
HOSTILE.add("declares more than deflate can hold", lambda _: _bomb(1 << 30, b"\0" * 1000, declared=1 << 30))
HOSTILE.add("no data.pkl", lambda _: _zipped({"data/0": b"12345", "version": "3\n"}))
HOSTILE.add("an empty archive", lambda _: _LOCAL + _zipped({}))
HOSTILE.add("no such storage", lambda _: _zipped({"data.pkl": _tensor_pickle(5, 5), "version": "3\n"}))
HOSTILE.add(
    "climbs out of the folder",
    lambda _: _zipped({"data.pkl": _tensor_pickle(5, 5), "../../data/0": b"12345", "version": "3\n"}),
)
HOSTILE.add(
    "a pickle cut off",
    lambda _: _zipped({"data.pkl": _tensor_pickle(5, 5)[:-30], "data/0": b"12345", "version": "3\n"}),
)
HOSTILE.add(
    "a pickle that is none", lambda _: _zipped({"data.pkl": b"\xff" * 100, "data/0": b"12345", "version": "3\n"})
)

# What is wrong with these is in the pickle, which verify does not run, or harmless to it.
SOUND_ARCHIVES = {
    name
    for name in HOSTILE
    if name.startswith(("storage of", "tensor of", "tensor with", "no such storage", "a pickle", "climbs"))
} | {"twice the same file"}
