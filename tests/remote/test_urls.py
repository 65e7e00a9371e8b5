"""What a URL is, what it is not, and what any store shows; on memory://, which comes with fsspec."""

import contextlib
import errno
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpus import CORPUS
from corpus_case import filled
from equality import difference

import statedict_io as sio
from statedict_io.__main__ import main
from statedict_io.installed import proofs
from statedict_io.remote import file_object
from statedict_io.remote.front_to_back import FrontToBackUpload, part_nbytes
from statedict_io.remote.stores import locate
from statedict_io.remote.urls import is_url

fsspec = pytest.importorskip("fsspec")
MIB = 1 << 20
NAMES = ["module_state_dict", "larger_than_one_region"]


@pytest.fixture
def memory():
    """The file system of memory://, empty."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def torch_bytes(obj, tmp_path, name="model.pt", **options):
    torch.save(obj, tmp_path / name, **options)
    return (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/model.pt", True),
        ("simplecache::s3://bucket/model.pt", True),
        ("abfs+x://model.pt", True),
        ("model.pt", False),
        ("/a/s3://b/model.pt", False),
        ("./s3://model.pt", False),
        ("s3:/bucket/model.pt", False),
        ("c://model.pt", False),
        ("a b://model.pt", False),
        (Path("s3://bucket/model.pt"), False),
        (b"s3://bucket/model.pt", False),
        (None, False),
    ],
)
def test_what_is_a_url(text, expected):
    assert is_url(text) is expected


def test_torch_refuses_them():
    """So nothing that works with torch.save means something else here."""
    with pytest.raises(RuntimeError, match="Parent directory"):
        torch.save({}, "memory://folder/model.pt")


def test_a_file_with_such_a_name_is_reached_by_another_spelling(memory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("memory:/folder")
    sio.save({"where": "store"}, "memory://folder/model.pt")
    assert not os.path.exists("memory:/folder/model.pt")
    sio.save({"where": "disk"}, "./memory://folder/model.pt")
    assert sio.load("memory://folder/model.pt") == {"where": "store"}
    assert torch.load("memory:/folder/model.pt") == {"where": "disk"}


@pytest.mark.parametrize(
    "options", [{}, {"_use_new_zipfile_serialization": False}, {"_disable_byteorder_record": True}]
)
@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_torch_save(name, options, memory, backend, tmp_path):
    obj = CORPUS[name]()
    sio.save(obj, "memory://folder/epoch=1.v2.ckpt", backend=backend, **options)
    assert memory.cat("/folder/epoch=1.v2.ckpt") == torch_bytes(obj, tmp_path, "epoch=1.v2.ckpt", **options)
    assert memory.find("/") == ["/folder/epoch=1.v2.ckpt"]


def test_the_bytes_of_a_torch_of_unknown_format(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(sio.backends.reproduction, "reproduced_by", lambda backend: proofs.Verdict(False))
    sio.save(CORPUS["module_state_dict"](), "memory://a/model.pt")
    assert memory.cat("/a/model.pt") == torch_bytes(CORPUS["module_state_dict"](), tmp_path)


def test_the_bytes_of_skipped_data(memory, tmp_path):
    with torch.serialization.skip_data():
        sio.save({"w": filled(1000)}, "memory://a/model.pt")
        expected = torch_bytes({"w": filled(1000)}, tmp_path)
    assert memory.cat("/a/model.pt") == expected


@pytest.mark.parametrize("name", NAMES)
def test_load_returns_what_torch_load_returns(name, memory, backend, tmp_path):
    memory.pipe("/model.pt", torch_bytes(CORPUS[name](), tmp_path))
    expected = torch.load(tmp_path / "model.pt")
    for options in ({}, {"verify": True}, {"map_location": "meta"}, {"weights_only": False}):
        found = sio.load("memory://model.pt", backend=backend, **options)
        wanted = torch.load(tmp_path / "model.pt", **{k: v for k, v in options.items() if k != "verify"})
        assert difference(found, wanted if "map_location" in options else expected) is None


def test_compressed_archives_load(memory, backend, tmp_path):
    import zipfile

    state = {"w": filled(300, 1000), "few": filled(3)}
    torch.save(state, tmp_path / "model.pt")
    with (
        zipfile.ZipFile(tmp_path / "model.pt") as old,
        zipfile.ZipFile(tmp_path / "again.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    memory.pipe("/again.pt", (tmp_path / "again.pt").read_bytes())
    assert difference(sio.load("memory://again.pt", verify=True, backend=backend), state) is None
    assert sio.verify("memory://again.pt").ok


def test_torchscript_loads(memory, tmp_path):
    module = torch.jit.script(torch.nn.Linear(3, 2))
    torch.jit.save(module, tmp_path / "model.pt")
    memory.pipe("/model.pt", (tmp_path / "model.pt").read_bytes())
    with pytest.warns(UserWarning, match="TorchScript"):
        found = sio.load("memory://model.pt", weights_only=False)
    assert torch.equal(found.weight, module.weight)


def test_file_urls_are_files(backend, tmp_path):
    url = f"file://{tmp_path}/model.pt"
    sio.save({"w": filled(5)}, url, backend=backend)
    assert (tmp_path / "model.pt").read_bytes() == torch_bytes({"w": filled(5)}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert sio.load(url, backend=backend, mmap=True)["w"].shape == (5,)
    assert sio.verify(url, backend=backend).path == url
    with pytest.raises(FileNotFoundError):
        sio.save({}, f"file://{tmp_path}/missing/model.pt")


def test_a_failed_save_keeps_the_old_object(memory, backend):
    sio.save({"old": 1}, "memory://a/model.pt")

    def fail(done, total):
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        sio.save({"w": filled(3 * MIB)}, "memory://a/model.pt", backend=backend, progress=fail)
    assert memory.find("/") == ["/a/model.pt"]
    assert sio.load("memory://a/model.pt") == {"old": 1}


def test_what_the_store_raises_names_the_url_and_leaves_nothing(memory, backend, monkeypatch):
    from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left")

    def odd(self, *args, **kwargs):
        raise KeyError("inside the store")

    for owner, name, fault, number in [
        (MemoryFile, "write", full, errno.ENOSPC),
        (MemoryFile, "write", odd, errno.EIO),
        (MemoryFileSystem, "mv", odd, errno.EIO),
        (MemoryFileSystem, "_open", odd, errno.EIO),
    ]:
        with monkeypatch.context() as context:
            context.setattr(owner, name, fault)
            with pytest.raises(OSError) as caught:
                sio.save({"w": filled(9)}, "memory://a/model.pt", backend=backend)
        assert (caught.value.errno, caught.value.filename) == (number, "memory://a/model.pt")
        gc.collect()
        assert memory.find("/") == []


def test_readers_of_one_object_do_not_disturb_each_other(memory):
    state = {f"t{i}": filled(300_000, seed=i) for i in range(8)}
    sio.save(state, "memory://model.pt")
    with sio.open_checkpoint("memory://model.pt") as first, sio.open_checkpoint("memory://model.pt") as second:
        for name in state:
            assert difference(first[name], state[name]) is None and difference(second[name], state[name]) is None
        sio.save({"new": 1}, "memory://model.pt")
        assert difference(first["t3"], state["t3"]) is None


@pytest.mark.parametrize("url", ["memory://", "memory://folder/"])
def test_a_folder_is_no_target(url, memory):
    with pytest.raises(IsADirectoryError) as caught:
        sio.save({}, url)
    assert caught.value.filename == url


def test_torchs_words_for_a_name_that_is_none(memory):
    with pytest.raises(RuntimeError, match="invalid file name"):
        sio.save({}, "memory://folder/.pt")


def test_a_missing_object(memory):
    for action in (sio.load, sio.open_checkpoint, sio.verify):
        with pytest.raises(FileNotFoundError) as caught:
            action("memory://missing.pt")
        assert str(caught.value) == "[Errno 2] No such file or directory: 'memory://missing.pt'"


def test_no_archive_and_a_legacy_file(memory, tmp_path):
    memory.pipe("/text.pt", b"hello " * 20)
    report = sio.verify("memory://text.pt")
    assert not report.ok and report.problems[0].startswith("memory://text.pt: ")
    memory.pipe("/legacy.pt", torch_bytes({"w": filled(5)}, tmp_path, _use_new_zipfile_serialization=False))
    with sio.open_checkpoint("memory://legacy.pt") as checkpoint:
        assert difference(dict(checkpoint), {"w": filled(5)}) is None
    assert difference(sio.load("memory://legacy.pt"), {"w": filled(5)}) is None
    with pytest.raises(ValueError, match=r"memory://legacy\.pt"):
        sio.load("memory://legacy.pt", verify=True)


def test_an_unknown_scheme():
    with pytest.raises(ValueError, match=r"nowhere://a\.pt: Protocol not known: nowhere.*available_protocols"):
        sio.save({}, "nowhere://a.pt")


def test_a_store_that_cannot_be_written():
    with pytest.raises(OSError) as caught:
        sio.save({}, "data://a/model.pt")
    assert caught.value.filename == "data://a/model.pt" and "Read only" in str(caught.value)


HIDE = """
import sys
class Hide:
    name = None
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
hide = Hide()
sys.meta_path.insert(0, hide)
import statedict_io as sio
for hide.name, url in [("fsspec", "s3://b/1.pt"), ("s3fs", "s3://b/2.pt"), ("gcsfs", "gs://b/3.pt")]:
    for action in (lambda: sio.save(1, url), lambda: sio.load(url), lambda: sio.verify(url)):
        try:
            action()
        except ImportError as e:
            print(e)
"""


def test_what_is_not_installed_is_named():
    environment = {**os.environ, "PYTHONPATH": str(Path(sio.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", HIDE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[:3] == ["s3://b/1.pt: URLs need fsspec: pip install 'statedict-io[remote]'"] * 3
    assert len(set(said[3:6])) == 1 and "s3://b/2.pt: Install s3fs to access S3" in said[3]
    assert len(set(said[6:9])) == 1 and "gs://b/3.pt: " in said[6] and "gcsfs" in said[6]
    assert len(said) == 9


def test_passwords_are_not_shown():
    assert locate("memory://me:secret@host/a.pt").url == "memory://me:***@host/a.pt"
    with pytest.raises(ValueError) as caught:
        sio.save({}, "nowhere://me:secret@host/a.pt")
    assert "secret" not in str(caught.value) and "me:***@host" in str(caught.value)


def test_saves_to_one_object_keep_their_order(memory, backend):
    pendings = [
        sio.save_async({"step": step, "w": filled(MIB)}, "memory://a/model.pt", backend=backend) for step in (1, 2)
    ]
    sio.save({"step": 3}, "memory:///a/model.pt", backend=backend)
    assert all(pending.done() for pending in pendings)
    sio.wait_all()
    assert sio.load("memory://a/model.pt") == {"step": 3}


def test_a_generation_is_read_to_the_end_where_gcsfs_knows_of_them():
    """Its file asks for ranges of its path, in which it takes a generation."""

    class File:
        details, path = {"generation": "17", "size": 3}, "bucket/model.pt"

    class FileSystem:
        version_aware = False

    file = File()
    assert file_object._pinned(file, FileSystem) is None and file.path == "bucket/model.pt"
    FileSystem.version_aware = True
    assert file_object._pinned(file, FileSystem) == "17" and file.path == "bucket/model.pt#17"
    assert file_object._pinned(file, FileSystem) == "17" and file.path == "bucket/model.pt#17"


def test_the_command_line(memory, capsys):
    sio.save({"w": filled(7, 3)}, "memory://a/model.pt")
    assert main(["verify", "memory://a/model.pt"]) == 0
    assert main(["inspect", "--json", "memory://a/model.pt"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tensors"][0]["shape"] == [7, 3] and found["file_nbytes"] == memory.size("/a/model.pt")
    assert main(["verify", "memory://missing.pt"]) == 2


def test_convert_reads_them(memory, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = {"w": filled(700, 300), "few": filled(3)}
    sio.save(state, "memory://a/model.pt")
    assert main(["convert", "memory://a/model.pt", str(tmp_path / "model.safetensors")]) == 0
    found = safetensors.load_file(tmp_path / "model.safetensors")
    assert found.keys() == state.keys() and all(difference(found[name], state[name]) is None for name in state)


def test_parts_are_few_enough_and_small():
    assert part_nbytes(1) == part_nbytes(100 << 30) == 16 * MIB
    for nbytes in (1 << 37, 5 << 40):
        assert part_nbytes(nbytes) % MIB == 0 and nbytes / part_nbytes(nbytes) <= 10_000
    assert part_nbytes(None) * 10_000 >= 600 << 30


class Committing:
    """A file of a store that keeps what is written back, or does not."""

    def __init__(self, log, path, **attributes):
        self.log, self.path = log, path
        self.__dict__.update(attributes)

    def write(self, data):
        assert type(data) is bytes and data == b"abc"  # not every file takes a memoryview

    def close(self):
        self.log.append(("close", self.path))

    def discard(self):
        self.log.append(("discard", self.path))


class CommittingByMethod(Committing):
    def commit(self):
        self.log.append(("commit", self.path))


class Store:
    protocol = "store"
    appears_when_opened = False

    def __init__(self, **attributes):
        self.log, self.attributes = [], attributes

    def open(self, path, mode, **options):
        return self.attributes.get("kind", Committing)(self.log, path, **self.attributes)

    def exists(self, path):
        return self.appears_when_opened

    def mv(self, source, destination):
        self.log.append(("mv", source, destination))

    def rm_file(self, path):
        self.log.append(("rm", path))


class Place:
    url, path, file_name = "store://a/model.pt", "a/model.pt", "model.pt"

    def __init__(self, fs):
        self.fs = fs


@pytest.mark.parametrize("attributes", [{"autocommit": False}, {}], ids=["says so", "does not say"])
def test_a_store_with_its_own_commit_writes_to_the_target(attributes):
    for fails in (False, True):
        fs = Store(kind=CommittingByMethod, **attributes)
        with contextlib.suppress(ZeroDivisionError), FrontToBackUpload(Place(fs), 3) as upload:
            upload.write(memoryview(b"abc"))
            if fails:
                raise ZeroDivisionError
            upload.commit()
        assert fs.log[0][0] == "discard" and fs.log[0][1].endswith(".sdio-tmp")
        last = [("discard", "a/model.pt")] if fails else [("close", "a/model.pt"), ("commit", "a/model.pt")]
        assert fs.log[1:] == last


@pytest.mark.parametrize("kind", [Committing, CommittingByMethod])
def test_a_store_without_one_gets_a_temporary_and_a_rename(kind):
    for fails in (False, True):
        fs = Store(kind=kind)
        fs.appears_when_opened = True
        with contextlib.suppress(ZeroDivisionError), FrontToBackUpload(Place(fs), 3) as upload:
            upload.write(memoryview(b"abc"))
            if fails:
                raise ZeroDivisionError
            upload.commit()
        (close, temporary), last = fs.log
        assert close == "close" and temporary.startswith("a/.model.pt.") and temporary.endswith(".sdio-tmp")
        assert last == (("rm", temporary) if fails else ("mv", temporary, "a/model.pt"))
