"""NAME.sha256 of an earlier save, when a file is saved without one: it goes before the file does, and only if it is
nothing but sums of what goes."""

import errno
import hashlib
import os
import pathlib

import pytest
import torch
from conftest import require_package

import statedict_io as sio
from statedict_io.conversion import convert
from statedict_io.system.directories import OpenDirectory

STATE = {"w": torch.arange(1000.0), "b": torch.ones(3)}


def to_dcp_writer(state, path, **options):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from statedict_io.dcp import SingleFileWriter

    dcp.save(state, storage_writer=SingleFileWriter(str(path), **options), no_dist=True)


def to_checkpoint_directory(state, path, *, atomic=True, **options):
    sio.CheckpointDirectory(path.parent, pattern="model-{step}.pt").save(state, 7, atomic=atomic, **options)


def converted(state, path, *, backend="auto", **options):
    source = path.parent.parent / "source.pt"
    sio.save(state, source, backend=backend)
    convert(str(source), str(path), **options)


#: name of the file, and what saves it
SAVES = {
    "save": ("model-7.pt", sio.save),
    "fastsave": ("model-7.pt", sio.fastsave),
    "save_async": ("model-7.pt", lambda *given, **options: sio.save_async(*given, **options).result()),
    "legacy": (
        "model-7.pt",
        lambda *given, **options: sio.save(*given, _use_new_zipfile_serialization=False, **options),
    ),
    "save_safetensors": ("model.safetensors", sio.save_safetensors),
    "convert": ("model.safetensors", converted),
    "convert to .pt": ("model-7.pt", converted),
    "SingleFileWriter": ("model-7.pt", to_dcp_writer),
    "CheckpointDirectory": ("model-7.pt", to_checkpoint_directory),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def forms(path):
    """What is nothing but a sum of the file."""
    name, sha256 = path.name, "0" * 64
    return [f"{sha256}  {name}\n", f"{sha256} *./{name}\n\n", f"SHA256 ({name}) = {sha256}\n", sha256.upper()]


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("way", SAVES)
def test_it_goes(way, atomic, backend, folder):
    name, save = SAVES[way]
    path = folder / name
    for content in forms(path):
        path.with_name(f"{name}.sha256").write_text(content)
        save(STATE, path, backend=backend, atomic=atomic)
        assert not path.with_name(f"{name}.sha256").exists() and path.exists()
    assert sio.verify(path).ok


def not_ours(path):
    name, line = f"{path.name}.sha256", f"{'0' * 64}  {path.name}\n"
    return {
        "of others too": lambda: (path.with_name(name)).write_text(f"{line}{'0' * 64}  other.pt\n"),
        "of another": lambda: path.with_name(name).write_text(f"{'0' * 64}  other.pt\n"),
        "with a remark": lambda: path.with_name(name).write_text(f"{line}# made by hand\n"),
        "empty": lambda: path.with_name(name).touch(),
        "not text": lambda: path.with_name(name).write_bytes(b"\xff\0" * 100),
        "long": lambda: path.with_name(name).write_text(line * 100_000),
        "a directory": lambda: path.with_name(name).mkdir(),
        "a link": lambda: path.with_name(name).symlink_to("elsewhere"),
        "a pipe": lambda: os.mkfifo(path.with_name(name)),
    }


@pytest.mark.parametrize("what", not_ours(pathlib.Path("x")))
def test_what_is_something_else_stays(what, backend, folder):
    path = folder / "model.pt"
    not_ours(path)[what]()
    beside = path.with_name("model.pt.sha256")
    facts = beside.lstat()
    sio.save(STATE, path, backend=backend)
    assert (beside.lstat().st_ino, beside.lstat().st_mtime_ns) == (facts.st_ino, facts.st_mtime_ns)
    assert torch.load(path)["b"].shape == (3,)


def test_without_one_a_save_makes_one_call_more(backend, folder, monkeypatch):
    calls = []

    def counted(method, original):
        def count(self, *given):
            calls.append((method, *given))
            return original(self, *given)

        return count

    for method in ("look_at", "open", "remove_file", "sync"):
        monkeypatch.setattr(OpenDirectory, method, counted(method, getattr(OpenDirectory, method)))
    sio.save(STATE, folder / "model.pt", backend=backend)
    assert [call for call in calls if str(call[1:]).count("sha256")] == [("look_at", "model.pt.sha256")]
    assert sum(call[0] == "sync" for call in calls) == 1


def test_a_name_that_leaves_no_room_for_one(backend, folder):
    sio.save(STATE, folder / ("x" * 255), backend=backend)
    assert os.listdir(folder) == ["x" * 255]


def test_one_that_cannot_be_removed_keeps_the_file(backend, folder, monkeypatch):
    """As with a new sum: what refutes the new file must not be there."""
    path = folder / "model.pt"
    path.write_bytes(b"old")
    path.with_name("model.pt.sha256").write_text(forms(path)[0])

    def refuse(self, name, remove=OpenDirectory.remove_file):
        if name.endswith(".sha256"):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), name)
        remove(self, name)

    monkeypatch.setattr(OpenDirectory, "remove_file", refuse)
    with pytest.raises(PermissionError, match=r"its sidecar 'model\.pt\.sha256' cannot be removed") as caught:
        sio.save(STATE, path, backend=backend)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and sorted(os.listdir(folder)) == ["model.pt", "model.pt.sha256"]


def test_in_a_store(backend):
    require_package("fsspec")
    import fsspec

    url = "memory://outdated/model.pt"
    store = fsspec.filesystem("memory")
    sio.save(STATE, url, digest="sha256", backend=backend)
    sio.save(STATE, url, backend=backend)
    assert store.exists(url) and not store.exists(f"{url}.sha256")
    for content in (f"{'0' * 64}  model.pt\n{'0' * 64}  other.pt\n", "mine"):
        store.pipe(f"{url}.sha256", content.encode())
        sio.save(STATE, url, backend=backend)
        assert store.cat(f"{url}.sha256") == content.encode()


# ---- sets of shards

SET = {name: torch.full((1000,), 1.0) for name in "abc"}
ENTRY = "model.safetensors.index.json"


@pytest.mark.parametrize("nbytes", [4000, 8000, 10**6])
def test_of_a_set(nbytes, backend, folder):
    """The sums of the set that was there, and those of single files that somebody has made."""
    sio.save_safetensors(SET, folder, max_shard_nbytes=4000, digest="sha256", backend=backend)
    for path in folder.glob("*.safetensors"):
        path.with_name(f"{path.name}.sha256").write_text(forms(path)[0])
    (folder / "model-00001-of-00003.safetensors.sha256").write_text("mine")
    sio.save_safetensors(SET, folder, max_shard_nbytes=nbytes, backend=backend)
    assert [path.name for path in folder.glob("*.sha256")] == ["model-00001-of-00003.safetensors.sha256"]
    assert (folder / "model-00001-of-00003.safetensors.sha256").read_text() == "mine"


def test_sums_of_a_set_go_before_it_does(backend, folder, monkeypatch):
    """Wherever the saver is killed, no sum refutes a sound file."""
    move = OpenDirectory.move

    def look_and_move(self, name, new_name):
        for beside in folder.glob("*.sha256"):
            for line in beside.read_text().splitlines():
                hexdigest, file = line.split("  ")
                assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == hexdigest
        move(self, name, new_name)

    sio.save_safetensors(SET, folder, max_shard_nbytes=4000, digest="sha256", backend=backend)
    for path in folder.glob("*.safetensors"):
        hexdigest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.with_name(f"{path.name}.sha256").write_text(f"{hexdigest}  {path.name}\n")
    monkeypatch.setattr(OpenDirectory, "move", look_and_move)
    new = {name: tensor + 1 for name, tensor in SET.items()}
    sio.save_safetensors(new, folder, max_shard_nbytes=4000, backend=backend)
    assert list(folder.glob("*.sha256")) == []


@pytest.mark.parametrize("suffix", ["", ENTRY])
def test_verify_compares_the_sums_of_a_set(suffix, backend, folder):
    sio.save_safetensors(SET, folder, max_shard_nbytes=4000, digest="sha256", backend=backend)
    report = sio.verify(folder / suffix, backend=backend)
    assert report.ok and report.checksums == "sha256" and {record.status for record in report.records} == {"ok"}
    for name in ("model-00002-of-00003.safetensors", ENTRY):
        before = (folder / name).read_bytes()
        damaged = before.replace(b"\n}", b" }") if name == ENTRY else before[:-1] + b"\1"
        (folder / name).write_bytes(damaged)
        report = sio.verify(folder / suffix, backend=backend)
        (problem,) = report.problems
        assert name in problem and f"{ENTRY}.sha256" in problem
        (folder / name).write_bytes(before)
    assert sio.verify(folder / suffix, backend=backend).ok
