"""A torch whose format is not ours writes by itself: its bytes, at every target, and nothing beside them."""

import errno
import io
import os
import tempfile
import threading

import pytest
import torch
from corpus_case import filled
from faults.ways import options_for

import statedict_io as sio
from statedict_io.installed import stock
from statedict_io.writing import stock_saves

OBJ = {"weight": filled(300, 300), "bias": filled(3)}
NAMES = [
    "model.pt", "noext", "a.b.c", "..pt", "..a", "q..", "archive.pt", "data.pkl", "a\\b.pt", "x" * 252 + ".pt",
    "x" * 255, "x" * 251 + ".a.b", "модель.pt", "é.a.b",
]  # fmt: skip


@pytest.fixture
def private(tmp_path, monkeypatch):
    """Where torch gets its paths."""
    (tmp_path / "private").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "private"))
    yield tmp_path / "private"
    assert os.listdir(tmp_path / "private") == []


@pytest.fixture(params=["links", "no links"])
def links(request, private, monkeypatch):
    if request.param == "no links":
        monkeypatch.setattr(stock_saves, "path_of_open_file", lambda fd: None)


def two_directories(tmp_path):
    for name in ("ref", "ours"):
        (tmp_path / name).mkdir()
    return tmp_path / "ref", tmp_path / "ours"


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_files(name, skips, links, tmp_path):
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


def test_pipes(links, tmp_path):
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


def test_torch_writes_into_the_temporary_itself(private, tmp_path, monkeypatch):
    """A disk needs room for one file, and no more is written than that."""
    led_to = []

    def save(obj, path, **options):
        led_to.append(os.readlink(path))
        led_to.append(os.path.realpath(path))
        stock.torch_save(obj, path, **options)

    monkeypatch.setattr(stock_saves, "torch_save", save)
    with options_for("stock"):
        for atomic in (True, False):
            sio.save(OBJ, tmp_path / "model.pt", atomic=atomic)
    assert led_to[0].startswith("/proc/self/fd/") and led_to[2].startswith("/proc/self/fd/")
    assert os.path.basename(led_to[1]).endswith(".sdio-tmp") and os.path.dirname(led_to[1]) == str(tmp_path)
    assert led_to[3] == str(tmp_path / "model.pt")


@pytest.mark.parametrize("save", [sio.save, lambda obj, path: sio.save_async(obj, path).result()])
def test_without_a_temporary_directory(save, tmp_path, monkeypatch):
    """Said in words that name the file and the cure; the old file stays."""
    (tmp_path / "model.pt").write_bytes(b"old")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with options_for("stock"), pytest.raises(OSError, match="TMPDIR") as caught:
        save(OBJ, tmp_path / "model.pt")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(tmp_path / "model.pt"))
    assert (tmp_path / "model.pt").read_bytes() == b"old" and os.listdir(tmp_path) == ["model.pt"]


def test_objects_that_cannot_be_pickled_are_refused_in_the_call(private, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"old")
    with options_for("stock"):
        for save in (torch.save, sio.save, sio.save_async):
            path = tmp_path / ("torch.pt" if save is torch.save else "model.pt")
            with pytest.raises(Exception, match="lambda"):
                save({"weight": filled(3), "hook": lambda: None}, path)
    assert (tmp_path / "model.pt").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "private", "torch.pt"]
