"""The installed torch.save as the oracle: one object saved by both, compared byte by byte.

`assert_same_file` is the test of choice. torch.save writes into ``ref/``, statedict_io into ``ours/``, under one file
name, because the name is part of the bytes. Where torch.save raises, statedict_io owes the same error and an
untouched directory.
"""

import difflib
import io
import pathlib
import pickletools
import re
import struct
import traceback
import zipfile

import torch
from equality import difference

import statedict_io as sio

CHUNK_NBYTES = 1 << 24
_TORCH_LOCATION = re.compile(r"^\[enforce fail at [^\]]*\] \. ")


def attempt(action, *args, **options):
    """(result, None) or (None, error)."""
    try:
        return action(*args, **options), None
    except Exception as error:
        return None, error


def assert_same_error(error, reference, ours="", ref=""):
    """`error` can be caught wherever `reference` is, and says at least as much."""
    where = "".join(traceback.format_exception(error)) if error else "nothing was raised"
    assert isinstance(error, type(reference)), f"torch.save raised {reference!r}, statedict_io: {where}"
    if isinstance(reference, RecursionError):
        return  # its text depends on the frame in which the stack ran out
    expected = _TORCH_LOCATION.sub("", str(reference).split("\nException raised from")[0])
    expected = expected.replace(str(ref), str(ours)) if ref else expected
    assert expected in str(error), f"torch.save said {expected!r}, statedict_io: {where}"


def record_at(path, offset):
    """A description of what lies at a byte offset of an archive, from its central directory."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            found = "before the first record"
            for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
                if info.header_offset > offset:
                    return found
                file.seek(info.header_offset + 26)
                name_nbytes, extra_nbytes = struct.unpack("<HH", file.read(4))
                start = info.header_offset + 30 + name_nbytes + extra_nbytes
                if offset < start:
                    part = f"local header, byte {offset - info.header_offset}"
                elif offset < start + info.file_size:
                    part = f"payload, byte {offset - start}"
                else:
                    part = f"descriptor or after, byte {offset - start - info.file_size}"
                found = f"{info.filename} ({info.file_size} bytes): {part}"
            return "the central directory" if offset >= archive.start_dir else found
    except Exception as error:
        return f"unreadable as a zip: {error!r}"


def _pickle_diff(ref, ours):
    texts = []
    for path in (ref, ours):
        try:
            with zipfile.ZipFile(path) as archive:
                name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
                text = io.StringIO()
                pickletools.dis(archive.read(name), text)
                texts.append(text.getvalue().splitlines())
        except Exception as error:
            return f"data.pkl could not be read from {path}: {error!r}"
    lines = list(difflib.unified_diff(*texts, "torch.save", "statedict_io", n=2, lineterm=""))
    return "\n".join(lines[:40]) if lines else "data.pkl is equal"


def first_difference(ref, ours):
    """The first offset at which two files differ, or None; reads them in chunks."""
    offset = 0
    with open(ref, "rb") as first, open(ours, "rb") as second:
        while True:
            a, b = first.read(CHUNK_NBYTES), second.read(CHUNK_NBYTES)
            if a != b:
                shorter = min(len(a), len(b))
                step = next((i for i in range(shorter) if a[i] != b[i]), shorter)
                return offset + step
            if not a:
                return None
            offset += len(a)


def assert_same_bytes(ref, ours):
    offset = first_difference(ref, ours)
    if offset is None:
        return
    with open(ref, "rb") as first, open(ours, "rb") as second:
        first.seek(offset), second.seek(offset)
        expected, actual = first.read(24).hex(" "), second.read(24).hex(" ")
    raise AssertionError(
        f"bytes differ at {offset}: torch.save has {expected}, statedict_io {actual}\n"
        f"in torch.save's file: {record_at(ref, offset)}\n"
        f"in ours: {record_at(ours, offset)}\n"
        f"sizes: {ref.stat().st_size} and {ours.stat().st_size}\n{_pickle_diff(ref, ours)}"
    )


def assert_loads_alike(ref, ours):
    """torch.load gives the same from both files, in each of its modes, and the zip is sound."""
    for weights_only in (True, False):
        for mmap in (False, True):
            options = {"weights_only": weights_only, "mmap": mmap}
            expected, reference = attempt(torch.load, ref, **options)
            actual, error = attempt(torch.load, ours, **options)
            if reference is not None:
                assert type(error) is type(reference), f"{options}: {error!r} instead of {reference!r}"
            else:
                assert error is None, f"{options}: {error!r}"
                found = difference(expected, actual)
                assert found is None, f"{options}: {found}"
    with zipfile.ZipFile(ours) as archive:
        assert archive.testzip() is None


def two_directories(tmp_path):
    ref, ours = pathlib.Path(tmp_path, "ref"), pathlib.Path(tmp_path, "ours")
    ref.mkdir(exist_ok=True)
    ours.mkdir(exist_ok=True)
    return ref, ours


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def assert_same_file(tmp_path, obj, backend, name="model.pt", *, load=True, durable=(True, False), **options):
    """Saves `obj` with both, once per element of `durable`; `options` go to both saves.

    Returns torch.save's error, or None where it saved.
    """
    ref, ours = two_directories(tmp_path)
    _, reference = attempt(torch.save, obj, ref / name, **options)
    for flush in durable:
        _, error = attempt(sio.save, obj, ours / name, backend=backend, durable=flush, **options)
        if reference is not None:
            assert_same_error(error, reference, ours, ref)
            assert names_in(ours) == []
        else:
            assert error is None, "".join(traceback.format_exception(error)) if error else ""
            assert_same_bytes(ref / name, ours / name)
            assert names_in(ours) == [name]
    # Files of equal bytes load alike: once for both backends.
    if reference is None and load and backend in ("native", None if sio.backend_info().name == "native" else backend):
        assert_loads_alike(ref / name, ours / name)
    return reference
