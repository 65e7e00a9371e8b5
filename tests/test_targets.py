"""What a save can go to: every target that torch.save takes, with its bytes; see also test_refused_targets.py."""

import errno
import gzip
import io
import lzma
import mmap
import os
import pathlib
import socket
import tempfile
import threading
import zipfile

import pytest
import torch
from corpus import CORPUS
from corpus_case import filled
from oracle import assert_same_bytes, names_in, two_directories

import statedict_io as sio

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL, LARGE = "module_state_dict", "larger_than_one_region"


def torch_stream_bytes(obj):
    stream = io.BytesIO()
    torch.save(obj, stream)
    return stream.getvalue()


class PathLike:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


class WritablePathLike(PathLike):
    def write(self, data):
        raise AssertionError("it is a path")


class StrSubclass(str):
    pass


@pytest.mark.parametrize("kind", [str, pathlib.Path, PathLike, WritablePathLike, StrSubclass])
@pytest.mark.parametrize("name", ["model.pt", "модель.pt"])
def test_paths_of_every_kind(kind, name, backend, tmp_path):
    ref, ours = two_directories(tmp_path)
    obj = CORPUS[SMALL]()
    torch.save(obj, kind(ref / name))
    sio.save(obj, kind(ours / name), backend=backend)
    assert_same_bytes(ref / name, ours / name)
    assert names_in(ours) == [name]


class Recorder:
    """Takes writes; any other method that is called fails the test."""

    def __init__(self):
        self.calls, self.data = [], bytearray()

    def write(self, data):
        self.calls.append("write")
        self.data += data

    def flush(self):
        self.calls.append("flush")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args, **kwargs):
            raise AssertionError(f"{name} was called")

        return refuse


@pytest.mark.parametrize("name", [SMALL, LARGE])
@pytest.mark.parametrize("durable", [True, False])
def test_only_write_and_flush_are_called_on_an_object(durable, name, backend):
    obj, target = CORPUS[name](), Recorder()
    sio.save(obj, target, backend=backend, durable=durable)
    assert bytes(target.data) == torch_stream_bytes(obj)
    assert target.calls[-1] == "flush"
    assert target.calls.count("flush") == 1


class WritesShort(io.RawIOBase):
    """A raw file that takes at most some bytes at a time, as the system may."""

    def __init__(self, most):
        self.most, self.data = most, bytearray()

    def writable(self):
        return True

    def write(self, data):
        taken = bytes(data[: self.most])
        self.data += taken
        return len(taken)


@pytest.mark.parametrize(("name", "most"), [(SMALL, 1), (SMALL, 7), (SMALL, 4096), (LARGE, 100_003)])
def test_short_writes_are_continued(name, most, backend):
    obj, target = CORPUS[name](), WritesShort(most)
    sio.save(obj, target, backend=backend)
    assert bytes(target.data) == torch_stream_bytes(obj)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), ValueError("no"), KeyboardInterrupt(), BrokenPipeError(32, "gone")]
)
@pytest.mark.parametrize("after", [0, 2])
def test_an_error_of_write_reaches_the_caller(error, after, backend):
    calls = []

    class Fails(Recorder):
        def write(self, data):
            calls.append(len(data))
            if len(calls) > after:
                raise error

    with pytest.raises(type(error)) as caught:
        sio.save(CORPUS[LARGE](), Fails(), backend=backend)
    assert caught.value is error
    assert len(calls) == after + 1, "write was called again after it had raised"


def test_an_error_of_flush_reaches_the_caller(backend):
    class Fails(Recorder):
        def flush(self):
            raise OSError(errno.EIO, "at flush")

    with pytest.raises(OSError, match="at flush"):
        sio.save({"a": filled(3)}, Fails(), backend=backend)


@pytest.mark.parametrize("position", [0, 6, 3, 20_000])
def test_a_bytesio_is_written_from_where_it_stands(position, backend):
    obj = CORPUS[SMALL]()
    results = []
    for save in (lambda f: torch.save(obj, f), lambda f: sio.save(obj, f, backend=backend)):
        stream = io.BytesIO(b"prefix" * 2000 + b"tail")
        stream.seek(position)
        save(stream)
        results.append((stream.tell(), stream.getvalue(), stream.closed))
    assert results[0] == results[1]


@pytest.mark.parametrize("mode", ["wb", "ab", "r+b", "w+b"])
@pytest.mark.parametrize("buffering", [-1, 0, 512])
def test_open_files_are_written_from_where_they_stand(mode, buffering, backend, tmp_path):
    obj = CORPUS[SMALL]()
    ref, ours = two_directories(tmp_path)
    for path, save in ((ref / "f", torch.save), (ours / "f", lambda obj, f: sio.save(obj, f, backend=backend))):
        path.write_bytes(b"what was there before")
        with open(path, mode, buffering=buffering) as file:
            if mode != "ab":
                file.write(b"head")
            save(obj, file)
            file.write(b"and after")
    assert_same_bytes(ref / "f", ours / "f")
    assert names_in(ours) == ["f"]


def test_a_large_object_into_an_unbuffered_file(backend, tmp_path):
    obj = CORPUS[LARGE]()
    with open(tmp_path / "f", "wb", buffering=0) as file:
        sio.save(obj, file, backend=backend)
    assert (tmp_path / "f").read_bytes() == torch_stream_bytes(obj)


def test_the_same_object_can_be_saved_to_one_stream_twice(backend):
    obj, stream = CORPUS[SMALL](), io.BytesIO()
    sio.save(obj, stream, backend=backend)
    sio.save(obj, stream, backend=backend)
    assert stream.getvalue() == torch_stream_bytes(obj) * 2


def collect(read, into):
    while chunk := read(1 << 16):
        into += chunk


def test_a_pipe(backend):
    obj, received = CORPUS[LARGE](), bytearray()
    read_fd, write_fd = os.pipe()
    reader = threading.Thread(target=collect, args=(lambda n: os.read(read_fd, n), received))
    reader.start()
    with os.fdopen(write_fd, "wb") as file:
        sio.save(obj, file, backend=backend)
    reader.join(60)
    os.close(read_fd)
    assert bytes(received) == torch_stream_bytes(obj)


def test_a_socket(backend):
    obj, received = CORPUS[LARGE](), bytearray()
    ours, theirs = socket.socketpair()
    reader = threading.Thread(target=collect, args=(theirs.recv, received))
    reader.start()
    with ours, ours.makefile("wb") as file:
        sio.save(obj, file, backend=backend)
    reader.join(60)
    theirs.close()
    assert bytes(received) == torch_stream_bytes(obj)


@pytest.mark.parametrize("module", [gzip, lzma])
def test_compressed_files(module, backend, tmp_path):
    obj = CORPUS[SMALL]()
    with module.open(tmp_path / "f", "wb") as file:
        sio.save(obj, file, backend=backend)
    with module.open(tmp_path / "f") as file:
        assert file.read() == torch_stream_bytes(obj)


def test_a_member_of_a_zip_file(backend):
    obj, outer = CORPUS[SMALL](), io.BytesIO()
    with zipfile.ZipFile(outer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("model.pt", "w") as file:
        sio.save(obj, file, backend=backend)
    assert zipfile.ZipFile(outer).read("model.pt") == torch_stream_bytes(obj)


@pytest.mark.parametrize("make", [tempfile.TemporaryFile, tempfile.NamedTemporaryFile, tempfile.SpooledTemporaryFile])
def test_temporary_files(make, backend):
    obj = CORPUS[SMALL]()
    with make() as file:
        sio.save(obj, file, backend=backend)
        file.seek(0)
        assert file.read() == torch_stream_bytes(obj)


def test_a_memory_map(backend):
    obj = CORPUS[SMALL]()
    expected = torch_stream_bytes(obj)
    with mmap.mmap(-1, len(expected)) as memory:
        sio.save(obj, memory, backend=backend)
        assert memory[:] == expected


@pytest.mark.parametrize(
    "name", ["top_level_untyped_storage", "payloads_like_descriptors", "training_state[Adam]", "many_small"]
)
def test_other_objects_into_a_stream(name, backend):
    obj, stream = CORPUS[name](), io.BytesIO()
    sio.save(obj, stream, backend=backend)
    assert stream.getvalue() == torch_stream_bytes(obj)


def test_the_legacy_format_into_a_stream(backend):
    obj, ours, ref = CORPUS[SMALL](), io.BytesIO(), io.BytesIO()
    torch.save(obj, ref, _use_new_zipfile_serialization=False)
    sio.save(obj, ours, backend=backend, _use_new_zipfile_serialization=False)
    assert ours.getvalue() == ref.getvalue()
