"""Places that are full, forbidden, linked, mapped or moved away under a save."""

import contextlib
import errno
import os
import pathlib
import pickle
import resource
import shutil
import subprocess
import tempfile

import pytest
import torch

import statedict_io as sio

NOBODY = 65534
OBJ = {"weight": torch.arange(1000, dtype=torch.int32)}
LARGE = {"weight": torch.arange(2 << 20, dtype=torch.int32)}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else or to mount")


def in_child(action, user=None):
    """What a forked child raised, or None; as another user if one is given."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        error = None
        try:
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            action()
        except BaseException as e:
            error = {name: getattr(e, name, None) for name in ("errno", "filename")} | {"types": repr(type(e).__mro__)}
        finally:
            os.write(write_end, pickle.dumps(error))
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        error = pickle.load(pipe)
    os.waitpid(child, 0)
    return error


@pytest.fixture
def place(backend):
    """A directory that everybody can reach; the backend has saved before, so that a child need import nothing."""
    directory = pathlib.Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    sio.save(OBJ, directory / "first.pt", backend=backend)
    (directory / "first.pt").unlink()
    yield directory
    directory.chmod(0o755)
    shutil.rmtree(directory)


@contextlib.contextmanager
def mounted(directory, *options):
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(directory)], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount here: {done.stderr.decode()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("way", ["directly", "through a symlink", "through a hard link"])
@pytest.mark.parametrize("obj", [OBJ, LARGE], ids=["small", "large"])
def test_over_the_file_that_the_tensors_are_mapped_from(obj, way, backend, tmp_path):
    path = tmp_path / "model.pt"
    (tmp_path / "links").mkdir()
    target = {"directly": path}.get(way, tmp_path / "links" / "model.pt")  # one name, as it is part of the bytes
    sio.save(obj, path, backend=backend)
    before = path.read_bytes()
    if way == "through a symlink":
        target.symlink_to(path)
    elif way == "through a hard link":
        os.link(path, target)
    mapped = torch.load(path, mmap=True)
    for _ in range(3):
        sio.save(mapped, target, backend=backend)
        assert target.read_bytes() == before
    assert torch.equal(mapped["weight"], obj["weight"])
    assert path.read_bytes() == before
    assert target.is_symlink() == (way == "through a symlink")
    if way == "through a hard link":  # the other name keeps the old file
        assert path.stat().st_ino != target.stat().st_ino


LINKS = {  # what each link of a chain that begins with model.pt says
    "beside": ["real.pt"],
    "absolute": ["{directory}/real.pt"],
    "to another directory": ["other/real.pt"],
    "up and down": ["other/../other/real.pt"],
    "a chain": ["second.pt", "other/third.pt", "../real.pt"],
    "through a directory's link": ["linked/real.pt"],
}


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("chain", LINKS)
def test_symlinks_stay_and_what_they_point_to_is_replaced(chain, exists, backend, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "linked").symlink_to("other")
    path, links = tmp_path / "model.pt", []
    for text in LINKS[chain]:
        text = text.format(directory=tmp_path)
        path.symlink_to(text)
        links.append((path, text))
        path = path.parent / text
    if exists:
        path.write_bytes(b"old")
    before = {name: os.listdir(tmp_path / name) for name in (".", "other")}
    sio.save(OBJ, tmp_path / "model.pt", backend=backend)
    assert [(link, os.readlink(link)) for link, _ in links] == links
    assert not path.is_symlink()
    assert torch.equal(torch.load(path)["weight"], OBJ["weight"])
    created = sum(set(os.listdir(tmp_path / name)) != set(before[name]) for name in before)
    assert created == (not exists)


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("umask", [0o077, 0o002, 0o022, 0o000])
def test_modes(umask, durable, backend, tmp_path, monkeypatch):
    previous = os.umask(umask)
    try:
        monkeypatch.setattr(os, "umask", None)  # it is the whole process's: nobody may call it
        sio.save(OBJ, tmp_path / "new.pt", backend=backend, durable=durable)
        assert (tmp_path / "new.pt").stat().st_mode & 0o7777 == 0o666 & ~umask
        for mode in (0o600, 0o640, 0o664, 0o666, 0o755, 0o200):
            path = tmp_path / f"{mode:o}.pt"
            path.touch()
            path.chmod(mode)
            sio.save(OBJ, path, backend=backend, durable=durable)
            assert path.stat().st_mode & 0o7777 == mode
    finally:
        monkeypatch.undo()
        os.umask(previous)


@as_root
def test_ownership_is_kept(backend, tmp_path):
    path = tmp_path / "model.pt"
    path.touch()
    os.chown(path, 1234, 4321)
    path.chmod(0o640)
    sio.save(OBJ, path, backend=backend)
    found = path.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (1234, 4321, 0o640)


@as_root
@pytest.mark.parametrize(
    ("old", "new"), [(0o676, 0o666), (0o2676, 0o666), (0o666, 0o666), (0o646, 0o646), (0o602, 0o602)]
)
def test_a_group_that_cannot_be_kept_lends_its_rights_to_no_other(old, new, backend, place):
    place.chmod(0o777)
    path = place / "model.pt"
    path.touch()
    os.chown(path, 0, 4321)
    path.chmod(old)
    assert in_child(lambda: sio.save(OBJ, path, backend=backend), NOBODY) is None
    found = path.stat()
    assert (found.st_uid, found.st_gid, oct(found.st_mode & 0o7777)) == (NOBODY, NOBODY, oct(new))


@as_root
@pytest.mark.parametrize(
    ("case", "expected"),
    [("read-only file", errno.EACCES), ("read-only directory", errno.EACCES), ("sticky directory", errno.EPERM)],
)
def test_forbidden_places(case, expected, backend, place):
    path = place / "model.pt"
    path.write_bytes(b"old")
    path.chmod(0o444 if case == "read-only file" else 0o666)
    place.chmod({"read-only directory": 0o755, "sticky directory": 0o1777}.get(case, 0o777))
    error = in_child(lambda: sio.save(OBJ, str(path), backend=backend), NOBODY)
    assert error is not None
    assert (error["errno"], error["filename"]) == (expected, str(path))
    assert ("RuntimeError" in error["types"]) == (case == "read-only file")  # torch.save refuses that one, too
    assert path.read_bytes() == b"old"
    assert os.listdir(place) == ["model.pt"]


@as_root
@pytest.mark.parametrize("durable", [True, False])
def test_a_directory_that_may_not_be_read(durable, backend, place):
    place.chmod(0o733)
    path = place / "model.pt"
    assert in_child(lambda: sio.save(OBJ, path, backend=backend, durable=durable), NOBODY) is None
    assert os.listdir(place) == ["model.pt"]
    assert torch.equal(torch.load(path)["weight"], OBJ["weight"])


@as_root
@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("options", ["size=1m", "nr_inodes=2"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_full_disk(zipped, options, durable, backend, tmp_path):
    path = tmp_path / "model.pt"
    with mounted(tmp_path, "-o", options):
        path.write_bytes(b"old")
        with pytest.raises(OSError) as caught:
            sio.save(LARGE, str(path), backend=backend, durable=durable, _use_new_zipfile_serialization=zipped)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["model.pt"]
        if options == "size=1m":
            sio.save(OBJ, path, backend=backend, durable=durable)
            assert torch.equal(torch.load(path)["weight"], OBJ["weight"])


@as_root
@pytest.mark.parametrize("exists", [True, False])
def test_a_read_only_file_system(exists, backend, tmp_path):
    path = tmp_path / "model.pt"
    with mounted(tmp_path):
        if exists:
            path.write_bytes(b"old")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with pytest.raises(OSError) as caught:
            sio.save(OBJ, str(path), backend=backend)
        assert (caught.value.errno, caught.value.filename) == (errno.EROFS, str(path))


@pytest.mark.parametrize("durable", [True, False])
def test_a_limit_on_file_size(durable, backend, place):
    path = place / "model.pt"
    path.write_bytes(b"old")

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        sio.save(LARGE, str(path), backend=backend, durable=durable)

    error = in_child(limited)
    assert error is not None
    assert (error["errno"], error["filename"]) == (errno.EFBIG, str(path))
    assert path.read_bytes() == b"old"
    assert os.listdir(place) == ["model.pt"]


@pytest.mark.parametrize("obj", [OBJ, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    "happens", ["target becomes a directory", "directory goes away", "directory moves", "target goes"]
)
def test_surprises_in_the_middle(happens, obj, backend, tmp_path):
    path, moved = tmp_path / "in" / "model.pt", tmp_path / "moved" / "model.pt"
    path.parent.mkdir()
    path.write_bytes(b"old")
    done = []

    def surprise(*_):
        if done:
            return
        done.append(happens)
        if happens.startswith("target"):
            path.unlink()
        if happens == "target becomes a directory":
            path.mkdir()
        elif happens == "directory goes away":
            shutil.rmtree(path.parent)
        elif happens == "directory moves":
            path.parent.rename(moved.parent)

    def save():
        sio.save(obj, str(path), backend=backend, progress=surprise)

    expected = {"target becomes a directory": errno.EISDIR, "directory goes away": errno.ENOENT}.get(happens)
    if expected is None:
        save()
        found = moved if happens == "directory moves" else path  # the save holds on to the directory, not to its name
        assert torch.equal(torch.load(found)["weight"], obj["weight"])
        assert os.listdir(found.parent) == ["model.pt"]
    else:
        with pytest.raises(OSError) as caught:
            save()
        assert (caught.value.errno, caught.value.filename) == (expected, str(path))
        assert os.listdir(tmp_path) == ["in"] * (happens != "directory goes away")
        assert not path.parent.exists() or os.listdir(path.parent) == ["model.pt"]


def test_what_cannot_be_pickled_creates_nothing(backend, tmp_path):
    for durable in (True, False):
        with pytest.raises(AttributeError):
            sio.save({**OBJ, "f": lambda: 0}, tmp_path / "model.pt", backend=backend, durable=durable)
        assert os.listdir(tmp_path) == []
