"""Targets and arguments that torch.save refuses: refused with the same error, nothing created, nothing changed."""

# ruff: noqa: SIM115 - open files are what these tests hand over

import errno
import io
import os
import pathlib

import pytest
import torch
from corpus_case import filled
from oracle import assert_same_error, attempt, two_directories

import statedict_io as sio

OBJ = {"weight": filled(50)}


class BytesPathLike:
    def __fspath__(self):
        return b"model.pt"


class RaisingPathLike:
    def __fspath__(self):
        raise KeyError("from __fspath__")


class WriteIsNotCallable:
    write = 3

    def flush(self):
        pass


class NoFlush:
    def __init__(self):
        self.calls = 0

    def write(self, data):
        self.calls += 1
        return len(data)


PATHS = [
    "", ".", "..", "/", ".pt", "d/", "./", "sub", "sub/", "sub/.pt", "sub/.", "sub/..", "missing/model.pt",
    "missing/", "old.pt/model.pt",
    "old.pt/", "old.pt/../model.pt", "sub/missing/model.pt", "x" * 256, "x" * 253 + ".pt", "a/" * 3000 + "model.pt",
    "\\", "a\\b.pt",
    "missing/é.pt", "old.pt/é.pt", "é" * 128, "é/", "loop.pt", "missing/dangling.pt", "/proc/version/x.pt",
    "to_missing_parent.pt",
]  # fmt: skip


def snapshot(directory):
    found = {}
    for path in sorted(directory.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(directory))] = content
    return found


@pytest.fixture
def directories(tmp_path):
    """Two equal directories with an old file, a directory and a symlink to itself."""
    for directory in two_directories(tmp_path):
        (directory / "sub").mkdir()
        (directory / "old.pt").write_bytes(b"the old checkpoint")
        (directory / "loop.pt").symlink_to("loop.pt")
        (directory / "to_missing_parent.pt").symlink_to("nowhere/model.pt")
    return two_directories(tmp_path)


def both(directories, make, monkeypatch, **options):
    """The errors of torch.save and sio.save on a fresh target each; ours must leave its directory as it was."""
    ref, ours = directories
    backend = options.pop("backend")
    monkeypatch.chdir(ref)
    _, reference = attempt(lambda: torch.save(OBJ, make(), **options))
    monkeypatch.chdir(ours)
    before = snapshot(ours)
    target = make()
    _, error = attempt(lambda: sio.save(OBJ, target, backend=backend, **options))
    assert snapshot(ours) == before
    assert reference is not None, "torch.save took it: this test compares nothing"
    return reference, error


PATHLIKES = [pathlib.Path(spelling) for spelling in PATHS if str(pathlib.Path(spelling)) == spelling]


@pytest.mark.parametrize("path", PATHS + PATHLIKES, ids=lambda path: f"{type(path).__name__}-{ascii(str(path))[1:30]}")
def test_paths_that_torch_refuses(path, backend, directories, monkeypatch):
    reference, error = both(directories, lambda: path, monkeypatch, backend=backend)
    assert_same_error(error, reference)


@pytest.mark.parametrize("spelling", ["missing/model.pt", "old.pt/model.pt", "sub", "x" * 256, "loop.pt"])
def test_what_the_system_refuses_is_also_an_oserror_with_errno_and_path(spelling, backend, directories, monkeypatch):
    monkeypatch.chdir(directories[1])
    with pytest.raises(OSError) as caught:
        sio.save(OBJ, spelling, backend=backend)
    assert caught.value.errno
    assert caught.value.filename == spelling
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("spelling", ["sub/model.pt", "to_missing_parent.pt"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_parent_that_cannot_be_examined_is_not_a_missing_one(spelling, number, backend, directories, monkeypatch):
    monkeypatch.chdir(directories[1])
    parent, opened = {"sub/model.pt": "sub", "to_missing_parent.pt": "nowhere"}[spelling], os.open

    def failing_open(path, *args, **options):
        if os.path.basename(os.fspath(path)) == parent:
            raise OSError(number, os.strerror(number))
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", failing_open)
    with pytest.raises(OSError) as caught:
        sio.save(OBJ, spelling, backend=backend)
    monkeypatch.undo()
    assert (caught.value.errno, caught.value.filename) == (number, spelling)
    assert isinstance(caught.value, RuntimeError)


OBJECTS = {
    "None": lambda: None, "int": lambda: 3, "bytes": lambda: b"model.pt", "object": object, "list": list,
    "tensor": lambda: torch.ones(2),
    "PathLike of bytes": BytesPathLike, "PathLike that raises": RaisingPathLike,
    "write is not callable": WriteIsNotCallable,
    "no flush": NoFlush, "closed BytesIO": lambda: closed(io.BytesIO()), "closed file": lambda: closed(open("old.pt",
    "rb")),
    "read-only file": lambda: open("old.pt", "rb"), "unbuffered read-only file": lambda: open("old.pt", "rb",
    buffering=0),
}  # fmt: skip


def closed(file):
    file.close()
    return file


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_that_torch_refuses(name, backend, directories, monkeypatch):
    reference, error = both(directories, OBJECTS[name], monkeypatch, backend=backend)
    assert_same_error(error, reference)


@pytest.mark.parametrize("make", [io.StringIO, lambda: open("old.pt", "a")], ids=["StringIO", "file"])
def test_text_mode_is_a_type_error(make, backend, directories, monkeypatch):
    reference, error = both(directories, make, monkeypatch, backend=backend)
    assert isinstance(reference, TypeError) and isinstance(error, TypeError)
    assert str(error).split(" not ")[0].split(", got")[0] == str(reference).split(" not ")[0].split(", got")[0]


def test_an_object_without_flush_is_refused_before_anything_is_written(backend):
    target = NoFlush()
    with pytest.raises(AttributeError, match="flush"):
        sio.save(OBJ, target, backend=backend)
    assert target.calls == 0


@pytest.mark.parametrize("path", ["a\0b.pt", "\0", "old.pt\0"])
def test_an_embedded_nul_is_an_error_where_torch_would_cut_the_name(path, backend, directories, monkeypatch):
    monkeypatch.chdir(directories[1])
    before = snapshot(directories[1])
    with pytest.raises(ValueError, match="null"):
        sio.save(OBJ, path, backend=backend)
    assert snapshot(directories[1]) == before


@pytest.mark.parametrize("protocol", [6, 99, "2", 2.5, None])
@pytest.mark.parametrize("target", ["new.pt", "old.pt"])
def test_a_protocol_that_pickle_refuses(target, protocol, backend, directories, monkeypatch):
    ref, ours = directories
    monkeypatch.chdir(ref)
    _, reference = attempt(lambda: torch.save(OBJ, target, pickle_protocol=protocol))
    monkeypatch.chdir(ours)
    before = snapshot(ours)
    _, error = attempt(lambda: sio.save(OBJ, target, backend=backend, pickle_protocol=protocol))
    if reference is None:
        assert error is None
        assert (ours / target).read_bytes() == (ref / target).read_bytes()
    else:
        assert_same_error(error, reference)
        assert snapshot(ours) == before


@pytest.mark.parametrize("module", [None, 3, object(), os])
def test_a_pickle_module_without_a_pickler(module, backend, directories, monkeypatch):
    reference, error = both(directories, lambda: "old.pt", monkeypatch, backend=backend, pickle_module=module)
    assert_same_error(error, reference)


def test_a_read_only_file_object_beside_a_legacy_save(backend, directories, monkeypatch):
    make = lambda: open("old.pt", "rb")  # noqa: E731
    reference, error = both(directories, make, monkeypatch, backend=backend, _use_new_zipfile_serialization=False)
    assert_same_error(error, reference)


@pytest.mark.parametrize("spelling", ["", ".", "sub", "missing/model.pt", "x" * 256, "loop.pt", "old.pt/x"])
def test_paths_that_the_legacy_format_refuses(spelling, backend, directories, monkeypatch):
    make = lambda: spelling  # noqa: E731
    reference, error = both(directories, make, monkeypatch, backend=backend, _use_new_zipfile_serialization=False)
    assert isinstance(error, OSError) and error.errno == reference.errno


def test_an_unknown_keyword_is_a_type_error_and_creates_nothing(backend, tmp_path):
    with pytest.raises(TypeError):
        sio.save(OBJ, tmp_path / "m.pt", backend=backend, nonsense=1)
    assert list(tmp_path.iterdir()) == []
