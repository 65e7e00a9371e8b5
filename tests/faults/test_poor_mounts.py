"""Mounts that refuse what others take: a save goes on there, slower, or says how the file can be written."""

import contextlib
import errno
import itertools
import os
import subprocess
import tempfile
import time
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp

import statedict_io as sio
from faults import fuse_server
from faults.ways import options_for
from statedict_io.__main__ import main
from statedict_io.conversion import convert
from statedict_io.dcp import SingleFileWriter
from statedict_io.dcp.conversion import dcp_to_file
from statedict_io.writing import places

OBJ = {"weight": torch.arange(1000, dtype=torch.int32), "step": 3}
LARGE = {"weight": torch.arange(9 << 18, dtype=torch.int32), "bias": torch.ones(3), "step": 3}  # two regions, and more
NO_RENAME = {"rename": errno.ENOSYS}


def save_async(obj, path, **options):
    sio.save_async(obj, path, **options).result(timeout=300)


def times(written, nbytes):
    """How often a file has been written; a direct write ends with a whole block."""
    count = written // nbytes
    assert written - count * nbytes <= count * 4096
    return count


def holds(path, obj):
    found = sio.load(path)
    return found["step"] == 3 and torch.equal(found["weight"], obj["weight"])


@pytest.fixture
def expected(tmp_path):
    """expected(obj): the bytes that torch.save writes under the name that these tests use."""
    (tmp_path / "by torch").mkdir()

    def by_torch(obj):
        torch.save(obj, tmp_path / "by torch" / "model.pt")
        return (tmp_path / "by torch" / "model.pt").read_bytes()

    return by_torch


GO_ON = {
    "in order only": ({}, True),
    "in order only, no ftruncate": ({"truncate": errno.ENOSYS}, True),
    "in order only, no preallocation": ({"fallocate": errno.EOPNOTSUPP}, True),
    "no ftruncate": ({"truncate": errno.ENOSYS, "fallocate": errno.EOPNOTSUPP}, False),
    "no chmod, no chown": ({"chmod": errno.ENOSYS, "chown": errno.ENOSYS}, False),
    "chmod and chown forbidden": ({"chmod": errno.EPERM, "chown": errno.EPERM}, False),
    "owners that it cannot hold": ({"chown": errno.EOVERFLOW}, False),
    "no fsync": ({"fsync": errno.EINVAL, "fsyncdir": errno.EINVAL}, False),
    "no list of names": ({"readdir": errno.EACCES, "opendir": errno.ENOSYS}, False),
    "no removal": ({"unlink": errno.EPERM}, False),
    "not opened for reading and writing": ({"read and write": errno.EINVAL}, False),
    "no locks": ({"setlk": errno.ENOLCK}, False),
    "locks unknown": ({"setlk": errno.ENOSYS}, False),
    "no access()": ({"access": errno.ENOSYS, "statfs": errno.ENOSYS}, False),
}


@pytest.mark.parametrize("refused", GO_ON)
def test_what_torch_save_can_do_without(refused, backend, tmp_path, expected):
    refuse, in_order = GO_ON[refused]
    with fuse_server.mounted(tmp_path / "mount", refuse=refuse, in_order=in_order) as mount:
        path = mount.path / "model.pt"
        for save, atomic in itertools.product((sio.save, save_async), (True, False)):
            places._in_order_only.clear()  # each finds out
            path.write_bytes(b"old")
            mount.give("model.pt", 1234)
            for obj, durable in ((OBJ, True), (LARGE, True), (LARGE, False)):
                save(obj, path, backend=backend, durable=durable, atomic=atomic)
                assert path.read_bytes() == expected(obj), (save, atomic, durable, len(obj))
            with torch.serialization.skip_data():
                save(LARGE, path, backend=backend, atomic=atomic)
                assert path.read_bytes() == expected(LARGE)
        if refused != "no list of names":
            assert os.listdir(mount.path) == ["model.pt"] or refused == "no removal"
            assert all(entry.stat().st_size == 0 for entry in mount.path.iterdir() if entry != path)


@pytest.mark.parametrize("way", ["legacy", "stock"])
@pytest.mark.parametrize("refused", GO_ON)
def test_what_torch_itself_writes(refused, way, tmp_path, monkeypatch):
    """Which is from front to back in any case, and on the mount alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    refuse, in_order = GO_ON[refused]
    with (
        fuse_server.mounted(tmp_path / "mount", refuse=refuse, in_order=in_order) as mount,
        options_for(way) as options,
    ):
        for atomic in (True, False):
            sio.save(LARGE, mount.path / "model.pt", atomic=atomic, **options)
            torch.save(LARGE, tmp_path / "model.pt", **options)
            assert (mount.path / "model.pt").read_bytes() == (tmp_path / "model.pt").read_bytes()


def test_a_mount_that_takes_bytes_in_order_only_is_remembered(backend, tmp_path):
    """The first save finds out, and writes a part twice; the others know."""
    with fuse_server.mounted(tmp_path / "mount", in_order=True) as mount:
        written = []
        for i in range(3):
            before = mount.counts()["bytes written"]
            sio.save(LARGE, mount.path / "model.pt", backend=backend)
            written.append(mount.counts()["bytes written"] - before)
            assert holds(mount.path / "model.pt", LARGE), i
        assert written[1] == written[2] == (mount.path / "model.pt").stat().st_size


def test_locks_that_keep_others_from_writing(backend, tmp_path, monkeypatch):
    """As SMB's: the ranks of one save write past the coordinator's descriptor, and so does torch."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with fuse_server.mounted(tmp_path / "mount", mandatory=True) as mount:
        path = mount.path / "model.pt"
        for _ in range(2):
            sio.save(LARGE, path, backend=backend)
            assert holds(path, LARGE)
            dcp.save(dict(LARGE), storage_writer=SingleFileWriter(path, backend=backend))
            assert holds(path, LARGE)
            for way in ("stock", "legacy"):
                with options_for(way) as options:
                    sio.save(LARGE, path, **options)
                assert torch.equal(torch.load(path)["weight"], LARGE["weight"])
        assert os.listdir(mount.path) == ["model.pt"]


def test_many_ranks_need_a_mount_that_takes_bytes_in_any_order(backend, tmp_path):
    with fuse_server.mounted(tmp_path / "mount", in_order=True) as mount:
        path = mount.path / "model.pt"
        path.write_bytes(b"old")
        with pytest.raises(BaseException, match=r"front to back.*FileSystemWriter.*model\.pt"):
            dcp_save(LARGE, path, backend=backend)
        assert path.read_bytes() == b"old"
        deadline = time.monotonic() + 60
        while os.listdir(mount.path) != ["model.pt"] and time.monotonic() < deadline:  # it hears of the end a bit later
            time.sleep(0.01)
        assert os.listdir(mount.path) == ["model.pt"]


def dcp_save(obj, path, **options):
    dcp.save({"weight": obj["weight"]}, storage_writer=SingleFileWriter(path, **options), no_dist=True)


def convert_to(obj, path, backend, **options):
    source = path.parent.parent / "source.safetensors"
    torch.save({"weight": obj["weight"]}, path.parent.parent / "source.pt")
    convert(str(path.parent.parent / "source.pt"), str(source))
    convert(str(source), str(path), **options)


def convert_directory_to(obj, path, **options):
    source = path.parent.parent / "directory"
    dcp.save({"weight": obj["weight"]}, checkpoint_id=source, no_dist=True)
    dcp_to_file(source, path, **options)


def patched_save(obj, path, **options):
    with sio.patch_torch(**options):
        torch.save(obj, path)


ENTRY_POINTS = {
    "save": sio.save,
    "fastsave": sio.fastsave,
    "save_async": save_async,
    "SingleFileWriter": dcp_save,
    "convert": convert_to,
    "dcp_to_file": convert_directory_to,
}


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EBUSY])
def test_a_mount_without_rename_names_the_way_to_write_in_place(number, backend, tmp_path):
    with fuse_server.mounted(tmp_path / "mount", refuse={"rename": number}) as mount:
        for name, write in ENTRY_POINTS.items():
            path = mount.path / "model.pt"
            for content in (None, b"old"):
                if content is not None:
                    path.write_bytes(content)
                with pytest.raises(BaseException, match="atomic=False") as caught:
                    write(OBJ, path, backend=backend)
                if isinstance(caught.value, OSError):  # DCP wraps it
                    assert (caught.value.errno, caught.value.filename) == (number, str(path)), name
                assert os.listdir(mount.path) == ([] if content is None else ["model.pt"]), name
            assert path.read_bytes() == b"old", name
            for obj in (LARGE, OBJ):  # the larger first: what follows is no longer there
                write(obj, path, backend=backend, atomic=False)
                assert torch.equal(torch.load(path)["weight"], obj["weight"]), name
                assert os.listdir(mount.path) == ["model.pt"], name
            path.unlink()


@pytest.mark.parametrize("name", [*ENTRY_POINTS, "patch_torch"])
def test_a_single_file_that_is_mounted_by_itself(name, backend, tmp_path):
    """As containers have them: its directory is another file system, and it cannot be renamed over."""
    inside, outside = tmp_path / "inside", tmp_path / "outside.pt"
    inside.mkdir()
    path = inside / "model.pt"
    outside.write_bytes(b"old"), path.touch()
    done = subprocess.run(["mount", "--bind", outside, path], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(done.stderr)
    try:
        if name != "patch_torch":
            with pytest.raises(BaseException, match="atomic=False"):
                ENTRY_POINTS[name](LARGE, path, backend=backend)
            assert outside.read_bytes() == b"old"
        for obj in (LARGE, OBJ):
            ENTRY_POINTS.get(name, patched_save)(obj, path, backend=backend, atomic=False)
            assert torch.equal(torch.load(outside)["weight"], obj["weight"])
        assert os.listdir(inside) == ["model.pt"]
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_the_command_line_names_its_way_to_write_in_place(tmp_path, capsys):
    torch.save({"weight": OBJ["weight"]}, tmp_path / "model.pt")
    dcp.save({"weight": OBJ["weight"]}, checkpoint_id=tmp_path / "directory", no_dist=True)
    with fuse_server.mounted(tmp_path / "mount", refuse=NO_RENAME) as mount:
        conversions = {"model.safetensors": "model.pt", "model.pt": "directory", "directory": "model.pt"}
        for name, source in conversions.items():
            command = ["convert", str(tmp_path / source), str(mount.path / name)]
            assert main(command) == 2
            assert "--in-place" in capsys.readouterr().err
            assert main([*command, "--in-place"]) == 0
        assert torch.equal(torch.load(mount.path / "model.pt")["weight"], OBJ["weight"])
        state = {"weight": torch.zeros_like(OBJ["weight"])}
        dcp.load(state, checkpoint_id=mount.path / "directory", no_dist=True)
        assert torch.equal(state["weight"], OBJ["weight"])
        assert sorted(os.listdir(mount.path)) == ["directory", "model.pt", "model.safetensors"]


@pytest.mark.parametrize("removes", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EBUSY])
def test_patch_torch_remembers_what_cannot_be_replaced(number, removes, backend, tmp_path):
    refuse = {"rename": number} | ({} if removes else {"unlink": errno.EPERM})
    with fuse_server.mounted(tmp_path / "mount", refuse=refuse) as mount:
        path, written, entries = mount.path / "model.pt", [], []
        with sio.patch_torch(backend=backend):
            for _ in range(3):
                before = mount.counts()["bytes written"]
                with pytest.warns(RuntimeWarning, match="cannot be replaced .*in place"):
                    torch.save(LARGE, path)
                written.append(mount.counts()["bytes written"] - before)
                entries.append(sorted(os.listdir(mount.path)))
                assert holds(path, LARGE)
        nbytes = path.stat().st_size
        assert [times(each, nbytes) for each in written] == [2, 1, 1]
        assert entries[0] == entries[1] == entries[2]
        others = [name for name in entries[0] if name != "model.pt"]
        assert len(others) == (not removes)
        assert all((mount.path / name).stat().st_size == 0 for name in others)
        with sio.patch_torch(backend=backend), pytest.warns(RuntimeWarning, match="cannot be replaced"):
            torch.save(OBJ, mount.path / "other.pt")  # ENOSYS is the mount's answer, EBUSY this file's alone
        assert holds(mount.path / "other.pt", OBJ)


def test_patch_torch_in_place_does_not_try(backend, tmp_path):
    with fuse_server.mounted(tmp_path / "mount", refuse=NO_RENAME) as mount, warnings.catch_warnings():
        warnings.simplefilter("error")
        with sio.patch_torch(backend=backend, atomic=False):
            torch.save(LARGE, mount.path / "model.pt")
        assert holds(mount.path / "model.pt", LARGE)
        assert mount.counts().get("rename", 0) + mount.counts().get("rename2", 0) == 0
        assert times(mount.counts()["bytes written"], (mount.path / "model.pt").stat().st_size) == 1


@pytest.mark.parametrize("refused", ["write", "flush"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_write_in_place_that_fails(exists, refused, backend, tmp_path):
    """What was there before is lost, and its name stays; what was not is not there."""
    with fuse_server.mounted(tmp_path / "mount", refuse={refused: errno.EIO}) as mount:
        path = mount.path / "model.pt"
        if exists:
            with contextlib.suppress(OSError):
                path.touch()
        for save in (sio.save, save_async):
            with pytest.raises(OSError) as caught:
                save(LARGE, path, backend=backend, durable=False, atomic=False)
            assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
            assert os.listdir(mount.path) == ["model.pt"] * exists


def test_a_bucket_mounted_as_a_directory(backend, tmp_path, expected):
    """All at once, as mountpoint-s3 has it: bytes go behind those that are there, and nothing is changed afterwards."""
    refuse = {"rename": errno.ENOSYS, "truncate": errno.ENOSYS, "chmod": errno.ENOSYS, "chown": errno.ENOSYS}
    refuse |= {"fallocate": errno.EOPNOTSUPP, "fsyncdir": errno.ENOSYS, "read and write": errno.EINVAL}
    with fuse_server.mounted(tmp_path / "mount", refuse=refuse, in_order=True) as mount:
        path = mount.path / "model.pt"
        for obj in (LARGE, OBJ, LARGE):
            with sio.patch_torch(backend=backend), pytest.warns(RuntimeWarning, match="written in place"):
                torch.save(obj, path)
            assert path.read_bytes() == expected(obj)
            for save in (sio.save, save_async):
                save(obj, path, backend=backend, atomic=False)
                assert path.read_bytes() == expected(obj)
        assert os.listdir(mount.path) == ["model.pt"]


def test_a_server_that_dies_leaves_no_call_waiting_and_no_mount(tmp_path):
    """Of the tests themselves."""
    with fuse_server.mounted(tmp_path / "mount") as mount:
        (mount.path / "model.pt").write_bytes(b"old")
        assert os.path.ismount(mount.path)
        mount.kill()
        with pytest.raises(OSError):
            sio.save(OBJ, mount.path / "model.pt")
    assert not os.path.ismount(mount.path) and os.listdir(mount.path) == []


@pytest.mark.parametrize("read", [sio.load, sio.verify, lambda path: dict(sio.open_checkpoint(path))])
def test_reading_where_no_advice_is_taken(read, tmp_path, monkeypatch):
    sio.save(LARGE, tmp_path / "model.pt")

    def refuse(*_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    assert read(tmp_path / "model.pt")
