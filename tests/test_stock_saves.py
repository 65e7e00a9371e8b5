"""A torch whose format is not ours writes by itself: its bytes, at every target, and nothing beside them."""

import errno
import io
import os
import tempfile
import threading
import traceback

import pytest
import torch
import torch.distributed.checkpoint as dcp
from corpus_case import filled
from faults.ways import options_for

import statedict_io as sio
from statedict_io.dcp import SingleFileWriter
from statedict_io.installed import stock
from statedict_io.writing import stock_saves

OBJ = {"weight": filled(300, 300), "bias": filled(3)}
NAMES = [
    "model.pt", "noext", "a.b.c", "..pt", "..a", "q..", "archive.pt", "data.pkl", "a\\b.pt", "x" * 230 + ".pt",
    "модель.pt", "é.a.b", "é" * 127,
]  # fmt: skip
TOO_LONG = [
    "x" * 252 + ".pt",
    "x" * 255,
    "x" * 251 + ".a.b",
]  # for a temporary after which torch could name the archive


def save_async(obj, path, **options):
    sio.save_async(obj, path, **options).result()


def patched_save(obj, path, *, atomic=True, backend="auto", **options):
    with sio.patch_torch(atomic=atomic, backend=backend):
        torch.save(obj, path, **options)


SAVES = {"save": sio.save, "save_async": save_async, "fastsave": sio.fastsave, "patched torch.save": patched_save}


@pytest.fixture
def private(tmp_path, monkeypatch):
    """Where torch gets its paths."""
    (tmp_path / "private").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "private"))
    yield tmp_path / "private"
    assert os.listdir(tmp_path / "private") == []


@pytest.fixture
def no_private(tmp_path, monkeypatch):
    """A directory for temporary files that is not there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))


@pytest.fixture(params=["by path", "copied"])
def opened(request, private, monkeypatch):
    """Whether torch opens what is written itself, or a private file: as where a mount refuses a second writer."""
    if request.param == "copied":
        monkeypatch.setattr(stock_saves, "_opens", lambda path, fd: False)


def two_directories(tmp_path):
    for name in ("ref", "ours"):
        (tmp_path / name).mkdir()
    return tmp_path / "ref", tmp_path / "ours"


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("name", NAMES + TOO_LONG, ids=lambda name: ascii(name[:20]))
def test_files(name, skips, opened, tmp_path):
    ref, ours = two_directories(tmp_path)
    with options_for("stock"):
        for options in ({}, {"_disable_byteorder_record": True}, {"pickle_protocol": 4}):
            with torch.serialization.skip_data() if skips else open(os.devnull):
                torch.save(OBJ, ref / name, **options)
                for atomic in (True, False):
                    sio.save(OBJ, ours / name, atomic=atomic, durable=False, **options)
                    assert (ours / name).read_bytes() == (ref / name).read_bytes()
                    assert os.listdir(ours) == [name]


@pytest.mark.parametrize("skips", [False, True])
def test_objects(skips, private):
    """Also where it makes holes, and from where the object stands."""
    with options_for("stock"):
        files = [io.BytesIO(b"before" * 20_000) for _ in range(2)]
        for save, file in zip((torch.save, sio.save), files, strict=True):
            file.seek(3)
            with torch.serialization.skip_data() if skips else open(os.devnull):
                save(OBJ, file)
        assert files[0].getvalue() == files[1].getvalue() and files[0].tell() == files[1].tell()


def test_an_object_that_cannot_seek_takes_no_holes(private):
    class Pipe:
        def write(self, data):
            return len(data)

        def flush(self):
            pass

    with options_for("stock"), torch.serialization.skip_data():
        for save in (torch.save, sio.save):
            with pytest.raises(RuntimeError, match="unexpected pos"):
                save(OBJ, Pipe())


def test_pipes(opened, tmp_path):
    read = {}
    for save in (torch.save, sio.save):
        fifo = tmp_path / "model.pt"
        os.mkfifo(fifo)
        reader = threading.Thread(target=lambda save=save, fifo=fifo: read.update({save: fifo.read_bytes()}))
        reader.start()
        with options_for("stock"):
            save(OBJ, fifo)
        reader.join(60)
        os.unlink(fifo)
    assert read[torch.save] == read[sio.save]


def test_torch_writes_into_the_file_itself(no_private, tmp_path, monkeypatch):
    """A disk needs room for one file beside the old one, and no more is written than that."""
    (tmp_path / "in").mkdir()
    opened, there = [], []

    def save(obj, path, **options):
        stock.torch_save(obj, path, **options)
        opened.append(os.path.realpath(path))
        there.append(sorted(os.listdir(tmp_path / "in")))

    monkeypatch.setattr(stock_saves, "torch_save", save)
    path = tmp_path / "in" / "model.pt"
    with options_for("stock"):
        for atomic in (True, True, False):
            sio.save(OBJ, path, atomic=atomic)
    names = [os.path.basename(each) for each in opened]
    assert all(name.startswith("model.") and name.endswith("sdio-tmp") for name in names[:2])
    assert there == [names[:1], sorted(["model.pt", names[1]]), ["model.pt"]] and opened[2] == str(path)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("way", ["stock", "legacy", "any"])
@pytest.mark.parametrize("atomic", [True, False])
def test_files_need_no_directory_for_temporary_files(atomic, way, save, backend, no_private, tmp_path):
    """A container may have none that can be written."""
    ref, ours = two_directories(tmp_path)
    names = ["model.pt", "noext", "модель.pt"]
    with options_for(way if way != "any" else "torch") as options:
        options = {name: value for name, value in options.items() if name != "backend"}
        for name in names:
            for skips in (False, way != "legacy"):
                with torch.serialization.skip_data() if skips else open(os.devnull):
                    torch.save(OBJ, ref / name, **options)
                    SAVES[save](OBJ, ours / name, atomic=atomic, backend=backend, **options)
                assert (ours / name).read_bytes() == (ref / name).read_bytes()
    assert sorted(os.listdir(ours)) == sorted(names)


def test_nor_do_links_and_working_directories(no_private, tmp_path, monkeypatch):
    """The archive is named after the path that was given."""
    ref, ours = two_directories(tmp_path)
    (tmp_path / "there").mkdir()
    for directory in (ref, ours):
        os.symlink(tmp_path / "there" / f"step-5.{directory.name}", directory / "latest.pt")
    with options_for("stock"):
        for directory in (ref, ours):
            monkeypatch.chdir(directory)
            torch.save(OBJ, "latest.pt") if directory is ref else sio.save(OBJ, "latest.pt")
        monkeypatch.chdir(ours)
        sio.save(OBJ, "latest.pt", atomic=False)
    assert (tmp_path / "there" / "step-5.ours").read_bytes() == (tmp_path / "there" / "step-5.ref").read_bytes()
    assert sorted(os.listdir(tmp_path / "there")) == ["step-5.ours", "step-5.ref"]


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", TOO_LONG, ids=lambda name: name[-4:])
def test_where_one_is_needed_the_error_says_so(name, save, no_private, tmp_path):
    """In words that name the file and the cure; the old file stays."""
    (tmp_path / name).write_bytes(b"old")
    with options_for("stock"), pytest.raises(OSError, match="TMPDIR") as caught:
        SAVES[save](OBJ, tmp_path / name)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(tmp_path / name))
    assert (tmp_path / name).read_bytes() == b"old" and os.listdir(tmp_path) == [name]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="changes owners")
@pytest.mark.parametrize("writer", ["torch", "SingleFileWriter"])
def test_files_that_a_group_may_write_and_their_owner_may_not(writer, no_private, tmp_path, monkeypatch):
    """The temporary has its owner's rights of the old file, and torch has to open it, or a rank."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    os.chown(path, 1234, 4321), path.chmod(0o464), tmp_path.chmod(0o777)
    monkeypatch.chdir(tmp_path)  # of whose parents another user can open none
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([]), os.setgid(4321), os.setuid(1235)
            if writer == "torch":
                with options_for("stock"):
                    sio.save(OBJ, "model.pt")
            else:
                dcp.save(dict(OBJ), storage_writer=SingleFileWriter("model.pt"), no_dist=True)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.load(path)["bias"].equal(OBJ["bias"]) and path.stat().st_mode & 0o777 == 0o464


def test_objects_that_cannot_be_pickled_are_refused_in_the_call(private, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"old")
    with options_for("stock"):
        for save in (torch.save, sio.save, sio.save_async):
            path = tmp_path / ("torch.pt" if save is torch.save else "model.pt")
            with pytest.raises(Exception, match="lambda"):
                save({"weight": filled(3), "hook": lambda: None}, path)
    assert (tmp_path / "model.pt").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "private", "torch.pt"]
