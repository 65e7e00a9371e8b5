"""Temporaries that nobody writes any more: removed by the next save of the same path. Those of living saves stay:
test_living_saves.py."""

import contextlib
import errno
import fcntl
import os
import re
import stat
import threading
import time

import pytest
import torch

import statedict_io as sio
from faults import fuse_server
from faults.temporary_files import DAY, HOUR, MINUTE, age
from faults.ways import OPTIONS, options_for, save
from statedict_io.system import locks
from statedict_io.system.directories import OpenDirectory
from statedict_io.writing import temporary_names

NAME = ".model.pt.0123456789ab.sdio-tmp"
OLD_NAME = ".model.pt.27e8cd5d.0a1b2c3d-4e5f6071-f0000001-800000-1.0-0.sdio-tmp"


@pytest.fixture(params=["ours", "torch's"])
def leave(request, tmp_path):
    """leave(name, seconds): a temporary that was written so long ago, or one that torch writes."""

    def leave(name, seconds):
        if request.param == "torch's":
            name = re.sub(r"^\.model\.pt\.(\w+)\.sdio-tmp$", r"model.\1-sdio-tmp", name)
        path = tmp_path / name
        path.write_bytes(b"half")
        age(path, seconds)
        return path

    return leave


@contextlib.contextmanager
def held(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def refused(error_number):
    """No file can be locked, as on some network file systems."""

    def refuse(*_):
        raise OSError(error_number, os.strerror(error_number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        yield


@contextlib.contextmanager
def by_the_rules_of_nfs():
    """A lock of a file is one of a range of bytes there: exclusive for who may write, shared for who may read."""
    flock = fcntl.flock

    def checked(fd, how):
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        wrong = os.O_RDONLY if how & fcntl.LOCK_EX else os.O_WRONLY
        if access == wrong and not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return flock(fd, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", checked)
        yield


@contextlib.contextmanager
def without_fcntl():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "fcntl", None)
        yield


LOCKS = {
    "free": lambda path: contextlib.nullcontext(),
    "held": held,
    "refused": lambda path: refused(errno.ENOLCK),
    "by the rules of NFS": lambda path: by_the_rules_of_nfs(),
    "unknown": lambda path: refused(errno.ENOSYS),
    "no fcntl": lambda path: without_fcntl(),
}
# After how many seconds a temporary is removed; half a minute before that it stays.
REMOVED_AFTER = {"free": MINUTE, "by the rules of NFS": MINUTE, "held": float("inf")}


@pytest.mark.parametrize("seconds", [-DAY, 0, MINUTE - 30, MINUTE + 30, DAY - 30, DAY + 30, 400 * DAY])
@pytest.mark.parametrize("lock", LOCKS)
def test_who_is_removed(lock, seconds, leave, tmp_path):
    """By the lock and the age; a time in the future is that of somebody whose clock is ahead."""
    leftover = leave(NAME, seconds)
    with LOCKS[lock](leftover):
        save(tmp_path / "model.pt")
        assert leftover.exists() == (seconds < REMOVED_AFTER.get(lock, DAY))
    assert sio.load(tmp_path / "model.pt")["weight"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("seconds", [0, DAY - 30, DAY + 30])
def test_of_versions_that_locked_nothing(seconds, leave, tmp_path):
    leftover = leave(OLD_NAME, seconds)
    save(tmp_path / "model.pt")
    assert leftover.exists() == (seconds < DAY)


def test_what_only_looks_like_a_leftover_stays(tmp_path):
    names = [
        ".other.pt.0123456789ab.sdio-tmp",
        ".model.0123456789ab.sdio-tmp",
        ".model.pt.old.0123456789ab.sdio-tmp",  # of model.pt.old
        ".model.pt.0123456789abcdef.sdio-tmp",  # an upload's, which is not locked
        ".model.pt.0123456789a.sdio-tmp",
        ".model.pt.0123456789AB.sdio-tmp",
        ".model.pt.0123456789ab.sdio-tmp.bak",
        ".model.pt.0123456789ab",
        ".model.pt..sdio-tmp",
        ".model.pt.sdio-tmp",
        "model.pt.0123456789ab.sdio-tmp",
        "model.pt.0123456789ab-sdio-tmp",
        "model.0123456789ab.sdio-tmp",
        "model.0123456789ab-sdio-tmp.pt",
        "model2.0123456789ab-sdio-tmp",
        ".model.pt.0123456789ab-sdio-tmp",
        ".model.pt.27e8cd5d.0a1b2c3d-4e5f6071-f0000001-800000.0-0.sdio-tmp",
        ".model.pt.27e8cd5d.sdio-tmp",
        "model.pt.tmp",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
        age(tmp_path / name, 2 * DAY)
    os.mkfifo(tmp_path / ".model.pt.00000000000a.sdio-tmp")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"mine")
    (tmp_path / ".model.pt.00000000000b.sdio-tmp").symlink_to("elsewhere")
    (tmp_path / ".model.pt.00000000000e.sdio-tmp").mkdir()
    (tmp_path / ".model.pt.00000000000c.sdio-tmp").symlink_to("elsewhere/file")
    (tmp_path / ".model.pt.00000000000d.sdio-tmp").symlink_to("nowhere")
    for letter in "abcde":
        os.utime(tmp_path / f".model.pt.00000000000{letter}.sdio-tmp", (time.time() - DAY,) * 2, follow_symlinks=False)
    before = sorted(os.listdir(tmp_path))
    save(tmp_path / "model.pt")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "model.pt"])
    assert os.listdir(tmp_path / "elsewhere") == ["file"]


# --- those who remove


def test_many_at_once(leave, tmp_path):
    """Savers that find the same leftovers, at the same time."""
    names = [f".model.pt.{number:012x}.sdio-tmp" for number in range(30)]
    for name in names:
        leave(name, HOUR)
    threads = [
        threading.Thread(target=save, args=(tmp_path / "model.pt", {"weight": torch.full((3,), i)})) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == ["model.pt"]
    sio.load(tmp_path / "model.pt", verify=True)


@pytest.mark.parametrize("when", ["look_at", "open", "remove_file"])
def test_one_that_another_removes_first(when, leave, tmp_path, monkeypatch):
    first, second = leave(NAME, HOUR), leave(NAME.replace("0", "1"), HOUR)
    called = getattr(OpenDirectory, when)

    def late(directory, name, *args):
        if name == first.name and first.exists():
            called_remove(directory, name)
        return called(directory, name, *args)

    called_remove = OpenDirectory.remove_file
    monkeypatch.setattr(OpenDirectory, when, late)
    save(tmp_path / "model.pt")
    assert os.listdir(tmp_path) == ["model.pt"] and not second.exists()


def test_one_that_a_reader_has_open(leave, tmp_path):
    leftover = leave(NAME, HOUR)
    descriptor = os.open(leftover, os.O_RDONLY)
    save(tmp_path / "model.pt")
    os.close(descriptor)
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize(("seconds", "stays"), [(HOUR, True), (DAY + HOUR, False)])
def test_one_that_may_not_be_opened(seconds, stays, leave, tmp_path, monkeypatch):
    """Another user's, in a directory that is shared."""
    leftover = leave(NAME, seconds)
    opened = OpenDirectory.open

    def forbid(directory, name, flags, mode=0o777):
        if name == leftover.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return opened(directory, name, flags, mode)

    monkeypatch.setattr(OpenDirectory, "open", forbid)
    save(tmp_path / "model.pt")
    assert leftover.exists() == stays


@pytest.mark.parametrize("ahead", [-2 * DAY, 2 * DAY])
@pytest.mark.parametrize("lock", ["free", "refused"])
def test_this_machines_clock_does_not_matter(ahead, lock, leave, tmp_path, monkeypatch):
    """Ages are differences of times that the file system gave, whose clock may be a server's."""
    young, old = leave(NAME, 30), leave(NAME.replace("0", "1"), DAY + HOUR)
    time_time = time.time
    monkeypatch.setattr(time, "time", lambda: time_time() + ahead)
    with LOCKS[lock](young):
        save(tmp_path / "model.pt")
    assert young.exists() and not old.exists()


@pytest.mark.parametrize(
    ("error", "removed"), [(None, {"old", "very old"}), (errno.ENOLCK, {"very old"}), (errno.ENOSYS, {"very old"})]
)
@pytest.mark.parametrize("ahead", [-3 * DAY, 3 * DAY])
def test_a_mount_with_a_clock_and_locks_of_its_own(ahead, error, removed, tmp_path):
    refuse = {} if error is None else {"setlk": error}
    ages = {"young": 10, "old": HOUR, "very old": 2 * DAY}
    with fuse_server.mounted(tmp_path / "mount", refuse=refuse, ahead=ahead) as mount:
        left = {name: mount.path / NAME.replace("0", str(i)) for i, name in enumerate(ages)}
        for name, path in left.items():
            path.write_bytes(b"half")
            age(path, ages[name] - ahead)
        save(mount.path / "model.pt")
        assert {name for name, path in left.items() if not path.exists()} == removed
        assert mount.counts()["setlk"] == 3  # one for the save, two looks at others


@pytest.mark.parametrize("way", OPTIONS)
def test_a_save_locks_once_and_lists_once(way, tmp_path, monkeypatch):
    if way == "native" and sio.backend_info().name != "native":
        pytest.skip("no native backend")
    calls = []
    for module, name in ((fcntl, "flock"), (os, "listdir"), (os, "utime")):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, function=function, name=name: calls.append(name) or function(*args)
        )
    with options_for(way) as options:
        save(tmp_path / "model.pt", **options)
    assert sorted(calls) == ["flock", "listdir"]


@pytest.mark.parametrize(
    "name", ["x" * 252 + ".pt", "é" * 126 + ".pt", "模" * 84 + ".pt", "x" * 59 + "模.pt", "a.b c.pt", "x"]
)
def test_names_of_temporaries(name, backend, tmp_path):
    """Short enough, whole characters, hidden, never what somebody who looks for *.pt finds; and found again."""
    seen = []
    save(tmp_path / name, backend=backend, progress=lambda *_: seen.extend(os.listdir(tmp_path)))
    assert os.listdir(tmp_path) == [name]
    (temporary,) = set(seen)
    assert len(os.fsencode(temporary)) <= 1 + 60 + 1 + 12 + 9
    assert temporary.encode("utf-8", "strict")
    assert temporary.startswith(".") and temporary.endswith(".sdio-tmp")
    (tmp_path / temporary).write_bytes(b"half")
    age(tmp_path / temporary, HOUR)
    save(tmp_path / name, backend=backend)
    assert os.listdir(tmp_path) == [name]


def test_names_are_used_once(tmp_path):
    names = temporary_names.TemporaryNames("model.pt", "model")
    used = {names.new(for_torch=i % 2 == 0) for i in range(10_000)}
    assert len(used) == 10_000
    assert all(names.has(name) for name in used)
