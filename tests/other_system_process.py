"""What the library does where names are missing that Linux has; run by test_other_systems.py, in a process of its own:

    other_system_process.py SYSTEM DIRECTORY SCENARIO...

prints a JSON object: what went wrong in each scenario, and the calls that it noted. Python and torch stay Linux's. What
they need is imported first; then the names are taken away, and the library is imported.
"""

import builtins
import concurrent.futures  # noqa: F401
import ctypes
import errno
import hashlib  # noqa: F401
import importlib
import io
import json
import os
import pathlib
import stat
import sys
import tempfile
import time
import traceback
import unicodedata
import uuid  # noqa: F401
import zipfile
from multiprocessing import connection  # noqa: F401

import torch
import torch.distributed.checkpoint
import torch.utils.serialization

# https://docs.python.org/3/library/os.html: "Availability: Unix" and the like.
NOT_ON_WINDOWS = frozenset(
    """
    pread preadv pwrite pwritev fchmod fchown chown lchown geteuid getuid getegid getgid getgroups getpgid
    posix_fadvise posix_fallocate statvfs fstatvfs register_at_fork fork forkpty sync fdatasync sysconf pathconf
    fpathconf major minor makedev mkfifo mknod get_blocking set_blocking uname getxattr setxattr listxattr sendfile
    copy_file_range memfd_create sched_getaffinity nice getloadavg wait waitid wait4 killpg openpty ttyname
    O_CLOEXEC O_NOFOLLOW O_DIRECTORY O_NONBLOCK O_PATH O_DIRECT O_SYNC O_DSYNC O_NOATIME
""".split()  # noqa: SIM905
)
MODULES_NOT_ON_WINDOWS = ("fcntl", "resource", "pwd", "grp", "termios", "posix", "tty", "pty")
NOT_ON_MACOS = frozenset(
    """
    preadv2 posix_fadvise posix_fallocate fdatasync copy_file_range memfd_create sched_getaffinity
    getxattr setxattr listxattr O_PATH O_DIRECT O_NOATIME
""".split()  # noqa: SIM905
)

calls = []  # of interest to a scenario: (name, arguments)


def hide_proc():
    """/proc, /sys and what else only Linux has."""

    def hidden(path):
        return isinstance(path, str) and path.startswith(("/proc", "/sys/"))

    def without(function):
        def call(path, *args, **options):
            if hidden(path):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return function(path, *args, **options)

        return call

    builtins.open = io.open = without(builtins.open)
    for name in ("open", "stat", "lstat", "readlink", "listdir"):
        shown = getattr(os, name)
        setattr(os, name, without(shown))
        for supporting in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
            if shown in supporting:
                supporting.add(getattr(os, name))


def without_directory_descriptors():
    """As on Windows: names are paths, a directory cannot be opened, an open file is neither replaced nor removed."""
    os.supports_dir_fd, os.supports_fd, os.supports_effective_ids = set(), set(), set()
    opened = {}  # descriptor -> (device, inode)

    def checked(function, *, replaces=None):
        def call(*args, dir_fd=None, src_dir_fd=None, dst_dir_fd=None, effective_ids=False, **options):
            if not (dir_fd is src_dir_fd is dst_dir_fd is None) or effective_ids:
                raise NotImplementedError("dir_fd unavailable on this platform")
            if replaces is not None:
                for argument in args[:2] if replaces == "both" else args[:1]:
                    try:
                        facts = os.stat(argument)
                    except OSError:
                        continue
                    if (facts.st_dev, facts.st_ino) in opened.values():
                        raise PermissionError(errno.EACCES, "Access is denied", argument)
            return function(*args, **options)

        return call

    os_open, os_close, listdir, fsync, os_rename = os.open, os.close, os.listdir, os.fsync, os.rename

    def open_file(path, flags, mode=0o777):
        flags &= ~os.O_BINARY if flags & os.O_BINARY else ~0
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        fd = os_open(path, flags, mode)
        facts = os.fstat(fd)
        opened[fd] = (facts.st_dev, facts.st_ino)
        return fd

    def open_binary(path, flags, mode=0o777):
        assert flags & os.O_BINARY, f"{path} is opened as text"
        return open_file(path, flags, mode)

    def close(fd):
        opened.pop(fd, None)
        os_close(fd)

    def list_directory(path="."):
        assert not isinstance(path, int)
        return listdir(path)

    def flush(fd):
        calls.append(("fsync", False))
        return fsync(fd)

    def rename(source, destination):
        if os.path.exists(destination):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), source, None, destination)
        return os_rename(source, destination)

    def kill(pid, number):
        raise AssertionError("os.kill() ends the process, whatever the signal")

    os.O_BINARY = 0x40000000
    os.open, os.close, os.listdir, os.fsync, os.kill = checked(open_binary), close, list_directory, flush, kill
    os.rename, os.replace = checked(rename), checked(os.replace, replaces="both")
    os.unlink = os.remove = checked(os.unlink, replaces="one")
    for name in ("stat", "lstat", "mkdir", "rmdir", "access", "readlink", "chmod", "utime", "link", "symlink"):
        setattr(os, name, checked(getattr(os, name)))

    # ctypes.CDLL(None) is the C library's own namespace, which Windows has not.
    class Library(ctypes.CDLL):
        def __init__(self, name, *args, **options):
            if name is None:
                raise TypeError("bad argument type for built-in operation")
            super().__init__(name, *args, **options)

    ctypes.CDLL = Library


def become(system):
    hide_proc()
    if system == "windows":
        without_directory_descriptors()
        names, modules = NOT_ON_WINDOWS, MODULES_NOT_ON_WINDOWS
        sys.platform, os.name = "win32", "nt"
        pathlib.WindowsPath = pathlib.PosixPath
    else:
        import fcntl

        os_fsync, fcntl_fcntl = os.fsync, fcntl.fcntl

        def fsync(fd):
            calls.append(("fsync", stat.S_ISDIR(os.fstat(fd).st_mode)))
            return os_fsync(fd)

        def control(fd, command, *args):
            if command != fcntl.F_FULLFSYNC:
                return fcntl_fcntl(fd, command, *args)
            calls.append(("F_FULLFSYNC", stat.S_ISDIR(os.fstat(fd).st_mode)))
            if os.environ.get("REFUSES_FULLFSYNC"):
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            return 0

        fcntl.F_FULLFSYNC = 51
        os.fsync, fcntl.fcntl = fsync, control
        os.pathconf = lambda path, name: {11: 0}[name]  # a volume that does not tell case apart
        names, modules = NOT_ON_MACOS, []
        sys.platform = "darwin"
    for name in names:
        if hasattr(os, name):
            delattr(os, name)
    for name in modules:
        sys.modules[name] = None


def state():
    torch.manual_seed(5)
    return {
        "large": torch.randn(1 << 19),
        "half": torch.randn(300, dtype=torch.float16),
        "lines": torch.tensor(list(b"\r\n\n\x1a\r\n" * 50), dtype=torch.uint8),
        "step": 7,
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name


def scenario_save(sio, directory):
    """All ways to save a path give torch.save's bytes; targets are replaced."""
    obj = state()
    (directory / "stock").mkdir()
    torch.save(obj, directory / "stock" / "model.pt")
    expected = (directory / "stock" / "model.pt").read_bytes()
    path = directory / "model.pt"
    for durable in (True, False):
        for save in (
            lambda: sio.save(obj, path, durable=durable),  # noqa: B023
            lambda: sio.save_async(obj, str(path), durable=durable).result(60),  # noqa: B023
            lambda: sio.save(obj, path, durable=durable, atomic=False),  # noqa: B023
        ):
            for _ in range(2):
                save()
                assert path.read_bytes() == expected
                assert sorted(os.listdir(directory)) == ["model.pt", "stock"]
    os.chdir(directory)
    sio.save(obj, "model.pt")
    assert path.read_bytes() == expected
    sio.save(obj, path, _use_new_zipfile_serialization=False)
    same(torch.load(path), obj)
    for missing in (directory / "no" / "model.pt", directory / "stock"):
        try:
            sio.save(obj, missing)
        except OSError as e:
            assert e.filename == str(missing)
        else:
            raise AssertionError(missing)


def scenario_load(sio, directory):
    obj = state()
    path = directory / "model.pt"
    torch.save(obj, path)
    same(sio.load(path), obj)
    same(sio.load(path, verify=True), obj)
    same(sio.load(str(path), mmap=True), obj)
    report = sio.verify(path)
    assert report.ok, report
    with sio.open_checkpoint(path) as checkpoint:
        assert torch.equal(checkpoint["large"], obj["large"]) and torch.equal(checkpoint["lines"], obj["lines"])
        assert torch.equal(checkpoint.get_slice("large")[5:9], obj["large"][5:9])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert not sio.verify(path).ok


def scenario_patch(sio, directory):
    obj = state()
    for _ in range(2):
        with sio.patch_torch():
            torch.save(obj, directory / "model.pt")
            buffer = io.BytesIO()
            torch.save(obj, buffer)
        same(torch.load(directory / "model.pt"), obj)
    assert torch.save is torch.serialization.save and os.listdir(directory) == ["model.pt"]


def scenario_leftovers(sio, directory):
    """By lock and age where there are locks, else by age alone."""
    names = [(f".model.pt.{i:012x}.sdio-tmp", f"model.{i:012x}-sdio-tmp") for i in range(3)]
    for pair, minutes in zip(names, (0.5, 10, 25 * 60), strict=True):
        for name in pair:
            (directory / name).write_bytes(b"half")
            os.utime(directory / name, (time.time() - 60 * minutes,) * 2)
    sio.save(state(), directory / "model.pt")
    expected = [name for pair in names[: 2 if sys.platform == "win32" else 1] for name in pair]
    assert sorted(os.listdir(directory)) == sorted([*expected, "model.pt"]), os.listdir(directory)


def scenario_convert(sio, directory):
    from statedict_io.conversion import convert

    obj = {name: value for name, value in state().items() if isinstance(value, torch.Tensor)}
    for _ in range(2):
        sio.save(obj, directory / "model.pt")
        convert(str(directory / "model.pt"), str(directory / "model.safetensors"))
        convert(str(directory / "model.safetensors"), str(directory / "again.pt"))
    same(torch.load(directory / "again.pt"), obj)
    assert sorted(os.listdir(directory)) == ["again.pt", "model.pt", "model.safetensors"]


def scenario_stock(sio, directory):
    """A torch whose format is not ours writes into the temporary by itself, and needs no other place for that."""
    from statedict_io import backends

    tempfile.tempdir = str(directory / "missing")
    choose, backends.choose = backends.choose, lambda wish: None
    try:
        for atomic in (True, True, False):
            sio.save(state(), directory / "model.pt", atomic=atomic)
            with zipfile.ZipFile(directory / "model.pt") as archive:
                assert "model/data.pkl" in archive.namelist()
            assert os.listdir(directory) == ["model.pt"]
    finally:
        backends.choose, tempfile.tempdir = choose, None


def scenario_open_files(sio, directory):
    """Windows: an open file is not replaced, and the error says what to do; other files of the directory are."""
    obj = state()
    path = directory / "model.pt"
    sio.save(obj, path)
    before = path.read_bytes()
    fd = os.open(path, os.O_RDONLY | os.O_BINARY)
    try:
        sio.save(obj, path)
    except OSError as e:
        assert e.errno == errno.EACCES and e.filename == str(path) and "open or mapped" in str(e), e
    else:
        raise AssertionError("replaced")
    assert path.read_bytes() == before and os.listdir(directory) == ["model.pt"]
    with sio.patch_torch():
        torch.save(obj, path)  # in place, with a warning
        os.close(fd)
        torch.save(obj, directory / "other.pt")
        torch.save(obj, directory / "other.pt")
    same(torch.load(path), obj)


def scenario_sync(sio, directory):
    sio.save(state(), directory / "model.pt", durable=True)


def scenario_sync_refused(sio, directory):
    os.environ["REFUSES_FULLFSYNC"] = "1"
    try:
        scenario_sync(sio, directory)
    finally:
        del os.environ["REFUSES_FULLFSYNC"]


def scenario_case(sio, directory):
    """Two names that differ in case, or in how an accent is written, are one file."""
    from statedict_io.writing.targets import resolve

    names = ["Modèle.pt", "modèle.PT", unicodedata.normalize("NFD", "modèle.pt")]
    targets = [resolve(str(directory / name)) for name in [*names, "other.pt"]]
    identities = [target.identity for target in targets]
    assert len(set(identities[:3])) == 1 and identities[3] != identities[0], identities
    pending = [sio.save_async(state() | {"step": step}, directory / "model.pt") for step in range(3)]
    for each in pending:
        each.result(60)
    assert torch.load(directory / "model.pt")["step"] == 2


def scenario_drives(sio, directory):
    """Names as Windows reads them. Comes last: it leaves the path module of Windows behind."""
    import ntpath

    del directory, sio
    os.path, os.sep, os.altsep = ntpath, "\\", "/"
    from statedict_io.system import directories

    importlib.reload(directories)
    for path, expected in {
        "C:\\dir\\model.pt": ("C:\\dir", "model.pt"),
        "C:/dir/model.pt": ("C:/dir", "model.pt"),
        "C:\\model.pt": ("C:\\", "model.pt"),
        "C:model.pt": ("C:", "model.pt"),
        "model.pt": ("", "model.pt"),
        "sub\\model.pt": ("sub", "model.pt"),
        "\\\\server\\share\\model.pt": ("\\\\server\\share\\", "model.pt"),
    }.items():
        assert directories.split(path) == expected, (path, directories.split(path))
    from statedict_io.remote.urls import is_url
    from statedict_io.writing.targets import archive_name_of

    assert not any(map(is_url, ["C:\\dir\\model.pt", "C:/dir/model.pt", "C://dir/model.pt"]))
    # caffe2/serialize/inline_container.cc, basename(): what is after the last slash of either kind.
    assert archive_name_of("C:\\dir\\model.v2.pt") == archive_name_of("C:/dir/model.v2.pt") == "model.v2"
    assert archive_name_of("C:model.pt") == "C:model"


if __name__ == "__main__":
    _, system, directory, *scenarios = sys.argv
    sys.modules["statedict_io._core"] = None  # compiled for Linux
    become(system)
    import statedict_io

    assert statedict_io.backend_info().name != "native"
    results = {}
    for scenario in scenarios:
        place = pathlib.Path(directory, scenario)
        place.mkdir()
        calls.clear()
        try:
            globals()[f"scenario_{scenario}"](statedict_io, place)
            error = None
        except Exception:
            error = traceback.format_exc()
        results[scenario] = {"error": error, "calls": list(calls)}
    print(json.dumps(results))
