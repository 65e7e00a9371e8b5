"""Temporaries that nobody writes any more: removed by the next save of the same path. Those of living saves stay."""

import contextlib
import errno
import fcntl
import os
import re
import signal
import stat
import subprocess
import threading
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import statedict_io as sio
from faults import fuse_server
from faults.temporary_files import HOUR, age, temporaries
from faults.ways import options_for
from statedict_io.dcp import SingleFileWriter
from statedict_io.system import locks
from statedict_io.system.directories import OpenDirectory
from statedict_io.writing import replacement, temporary_names
from statedict_io.writing.targets import resolve

MINUTE = 60
DAY = 24 * HOUR
OBJ = {"weight": torch.ones(3)}
NAME = ".model.pt.0123456789ab.sdio-tmp"
OLD_NAME = ".model.pt.27e8cd5d.0a1b2c3d-4e5f6071-f0000001-800000-1.0-0.sdio-tmp"


def save(path, obj=OBJ, **options):
    sio.save(obj, path, durable=False, **options)


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


# --- living saves


SAVERS = {
    "native": {"backend": "native"},
    "python": {"backend": "python"},
    "legacy": {"_use_new_zipfile_serialization": False},
    "stock": {},
}


class Saver:
    """A process that saves model.pt in ``directory`` and stops in the middle.

    Args:
        starts: "fork": another process, ``child``, which has all that it has; "exec": another program, which does not
            close what it has inherited.
    """

    def __init__(self, directory, *, starts="", backend="auto"):
        self.child = 0
        told, tell = os.pipe()
        waits, self.tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self.save(directory, starts, backend, tell, waits)
                status = 0
            finally:
                os._exit(status)
        os.close(tell)
        os.close(waits)
        with open(told) as lines:
            self.child = int(lines.readline())
        (self.temporary,) = temporaries(directory)

    @staticmethod
    def save(directory, starts, backend, tell, waits):
        signal.alarm(100)
        torch.set_num_threads(1)  # OpenMP's threads do not survive fork(), and torch waits for them

        def stop(*_):
            nonlocal tell
            if tell is None:
                return
            child = 0
            if starts == "fork":
                child = os.fork()
                if child == 0:
                    os.close(tell)
                    signal.alarm(100)
                    signal.pause()
            if starts == "exec":
                of_its_own = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
                child = subprocess.Popen(["sleep", "100"], close_fds=False, **of_its_own).pid
            os.write(tell, b"%d\n" % child)
            os.close(tell)
            tell = None
            os.read(waits, 1)

        save(directory / "model.pt", {"weight": torch.zeros(1 << 20)}, progress=stop, backend=backend)

    def finish(self):
        os.write(self.tell, b"!")
        pid, self.pid = self.pid, 0
        assert os.waitpid(pid, 0)[1] == 0

    def kill(self):
        pid, self.pid = self.pid, 0
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def close(self):
        self.kill()
        if self.child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, signal.SIGKILL)
        os.close(self.tell)


@pytest.fixture
def saver(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(**options):
            return stack.enter_context(contextlib.closing(Saver(tmp_path, **options)))

        yield start


def test_another_process(saver, backend, tmp_path):
    """Stays while it lives, also where it is stopped and has written nothing for days; goes when it has been killed."""
    path = tmp_path / "model.pt"
    other = saver(backend=backend)
    os.kill(other.pid, signal.SIGSTOP)
    age(other.temporary, 3 * DAY)
    save(path)
    assert other.temporary.exists()
    os.kill(other.pid, signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    age(other.temporary, 0)
    save(path)
    assert other.temporary.exists()
    age(other.temporary, 2 * MINUTE)
    save(path)
    assert not other.temporary.exists()


def test_another_process_that_goes_on(saver, backend, tmp_path):
    other = saver(backend=backend)
    age(other.temporary, 3 * DAY)
    save(tmp_path / "model.pt")
    other.finish()
    assert sio.load(tmp_path / "model.pt")["weight"].numel() == 1 << 20
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_forked_child_keeps_its_parents_temporary(saver, backend, tmp_path):
    """As long as it lives: it has the file open, as the parent had."""
    path = tmp_path / "model.pt"
    other = saver(starts="fork", backend=backend)
    other.kill()
    age(other.temporary, 3 * DAY)
    save(path)
    assert other.temporary.exists()
    os.kill(other.child, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while other.temporary.exists() and time.monotonic() < deadline:  # it ends at its own pace, and nobody waits for it
        save(path)
    assert not other.temporary.exists()


def test_another_program_keeps_nothing(saver, tmp_path):
    other = saver(starts="exec")
    other.kill()
    os.kill(other.child, 0)  # lives
    age(other.temporary, 2 * MINUTE)
    save(tmp_path / "model.pt")
    assert not other.temporary.exists()


def in_a_forked_child(action):
    """How a child that does it ends."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(100)
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def test_a_forked_child_that_saves_to_the_path(backend, tmp_path):
    path, seen = tmp_path / "model.pt", []

    def in_the_middle(*_):
        if not seen:
            (temporary,) = temporaries(tmp_path)
            age(temporary, 3 * DAY)
            seen.append(in_a_forked_child(lambda: save(path, backend=backend)))
            save(path, backend=backend)
            assert temporary.exists()

    torch.set_num_threads(1)  # OpenMP's threads do not survive fork(), and torch waits for them
    save(path, {"weight": torch.zeros(1 << 20)}, backend=backend, progress=in_the_middle)
    assert seen == [0]
    assert sio.load(path)["weight"].numel() == 3  # of the call that began last
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("for_torch", [False, True])
def test_a_forked_child_that_drops_its_parents_save(for_torch, tmp_path):
    """It neither removes the temporary nor ends the lock."""
    path = tmp_path / "model.pt"
    target = resolve(str(path))
    with replacement.Replacement(target, durable=False, for_torch=for_torch) as file:
        (temporary,) = temporaries(tmp_path)
        temporary.write_bytes(b"new")
        assert in_a_forked_child(file.abandon) == 0
        age(temporary, 3 * DAY)
        save(path)
        assert temporary.exists()
        file.commit()
    target.close()
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("way", SAVERS)
def test_another_save_of_this_process(way, tmp_path):
    """Also where another descriptor of the temporary has been opened and closed."""
    if way == "native" and sio.backend_info().name != "native":
        pytest.skip("no native backend")
    path, seen = tmp_path / "model.pt", []

    class Saves:
        def __reduce__(self):
            for temporary in temporaries(tmp_path):
                temporary.read_bytes()
                age(temporary, 3 * DAY)
                save(path, **SAVERS[way])
                assert temporary.exists()
                seen.append(temporary)
            return str, ("",)

    def in_the_middle(*_):
        if not seen:
            Saves().__reduce__()

    options = SAVERS[way]
    if way in ("legacy", "stock"):  # torch pickles into the temporary
        with options_for(way):
            sio.save([torch.zeros(3), Saves()], path, **options)
    else:
        sio.save([torch.zeros(1 << 20)], path, progress=in_the_middle, **options)
    assert len(seen) == 1 and os.listdir(tmp_path) == ["model.pt"]


def test_a_save_of_many_ranks(backend, tmp_path):
    """The coordinator holds it until the end, whoever else has had it open."""
    path, seen = tmp_path / "model.pt", []

    def another_save(when):
        (temporary,) = temporaries(tmp_path)
        age(temporary, 3 * DAY)
        save(path)
        assert temporary.exists()
        seen.append(when)

    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item):
            another_save("while a rank collects")
            return super().resolve_data(write_item)

    class Writer(SingleFileWriter):
        def finish(self, metadata, results):
            another_save("when all have written")
            super().finish(metadata, results)

    state = {"weight": torch.zeros(1 << 20)}
    dcp.save(state, storage_writer=Writer(path, backend=backend), planner=Planner())
    assert seen == ["while a rank collects", "when all have written"]
    assert sio.load(path)["weight"].numel() == 1 << 20 and os.listdir(tmp_path) == ["model.pt"]


def test_just_created_and_not_locked_yet(tmp_path, monkeypatch):
    """The other thread's file is seen in the instant before its lock."""
    created, go_on, path = threading.Event(), threading.Event(), tmp_path / "model.pt"
    hold = locks.hold

    def hold_late(fd, **options):
        if threading.current_thread() is thread:
            created.set()
            assert go_on.wait(100)
        return hold(fd, **options)

    monkeypatch.setattr(locks, "hold", hold_late)
    thread = threading.Thread(target=save, args=(path, {"weight": torch.zeros(5)}))
    thread.start()
    assert created.wait(100)
    (temporary,) = temporaries(tmp_path)
    save(path)
    assert temporary.exists()
    go_on.set()
    thread.join()
    assert sio.load(path)["weight"].numel() == 5


@pytest.mark.parametrize("durable", [True, False])
def test_written_and_not_renamed_yet(durable, tmp_path, monkeypatch):
    """It is closed then, and so not locked; after a long flush, or a long wait for other saves, it would look old."""
    path, now = tmp_path / "model.pt", time.monotonic()
    target, asked = resolve(str(path)), []

    def wait():
        asked.append(1)
        (temporary,) = temporaries(tmp_path)
        if len(asked) == 1:  # still locked
            age(temporary, HOUR)
        save(path)
        if len(asked) == 1:
            monkeypatch.setattr(time, "monotonic", lambda: now + HOUR)
        assert temporary.exists()
        return False

    with replacement.Replacement(target, durable=durable) as file:
        os.write(file.fd, b"new")
        file.commit(wait)
    target.close()
    assert len(asked) == 2 and path.read_bytes() == b"new"


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


@pytest.mark.parametrize("way", SAVERS)
def test_a_save_locks_once_and_lists_once(way, tmp_path, monkeypatch):
    if way == "native" and sio.backend_info().name != "native":
        pytest.skip("no native backend")
    calls = []
    for module, name in ((fcntl, "flock"), (os, "listdir"), (os, "utime")):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, function=function, name=name: calls.append(name) or function(*args)
        )
    with options_for(way if way != "python" else "torch"):
        save(tmp_path / "model.pt", **SAVERS[way])
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
