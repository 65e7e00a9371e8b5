"""Atomic, durable replacement of a file: whoever looks, at whatever instant, finds the old file or the new one, whole.

Both backends write through this. Order on the device: write, fsync, close, rename, fsync of the directory. The temporary lies in the target's
directory, because a rename is atomic within one file system only.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import os
import shutil
import socket
import stat
import time
from types import TracebackType

from .targets import FileTarget

_SUFFIX = ".sdio-tmp"
_READABLE_NBYTES = 60  # of the target's name, so that a leftover tells what it was to become
_FOREIGN_LEFTOVER_SECONDS = 24 * 3600
_serial = itertools.count()


class Replacement:
    """A temporary that becomes ``target`` on :meth:`commit` and vanishes otherwise.

    Use as a context manager, from one thread. ``fd`` is the temporary's descriptor, open for writing at offset 0.

    Args:
        target: what to replace.
        durable: fsync the file and its directory.
        as_directory: make a private directory instead, for a writer that opens files by path: it writes
            ``path_inside``. ``fd`` is not set.
    """

    fd: int

    def __init__(self, target: FileTarget, *, durable: bool, as_directory: bool = False) -> None:
        self._target = target
        self._durable = durable
        self._as_directory = as_directory
        self._directory, self._name = os.path.split(target.path)
        self._directory_fd = -1
        self._temporary = ""
        self.fd = -1

    @property
    def path_inside(self) -> str:
        return os.path.join(self._directory, self._temporary, os.path.basename(self._target.given))

    def __enter__(self) -> Replacement:
        with self._naming_target():
            try:
                self._directory_fd = _open_directory(self._directory)
                _remove_leftovers(self._directory_fd, self._directory, self._name)
                self._create()
            except BaseException:
                self._abandon()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._abandon()
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            error.filename = self._target.given

    def commit(self) -> None:
        """Puts the temporary in the target's place. On an error the target is untouched, unless it is the last fsync that fails: then the
        new file is there, and what may not survive a power loss is its name."""
        with self._naming_target():
            if self._as_directory:
                self.fd = os.open(self.path_inside, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._take_over_ownership()
            if self._durable:
                os.fsync(self.fd)
            # Closed first: close can report a write error (NFS, quota), and some network mounts refuse to rename an open file.
            fd, self.fd = self.fd, -1
            os.close(fd)
            source = self._temporary
            if self._as_directory:
                source = os.path.join(self._temporary, os.path.basename(self._target.given))
            os.rename(source, self._name, src_dir_fd=self._directory_fd, dst_dir_fd=self._directory_fd)
            if self._as_directory:
                self._remove_temporary()
            self._temporary = ""
            if self._durable:
                _sync_directory(self._directory_fd)

    def _create(self) -> None:
        existing = self._target.existing
        # Never more permissive than the file it will replace. A new file's mode is 0666 less the umask, which open() applies.
        mode = 0o666 if existing is None else stat.S_IMODE(existing.st_mode) & 0o666
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            self._temporary = _temporary_name(self._name)
            try:
                if self._as_directory:
                    os.mkdir(self._temporary, 0o700, dir_fd=self._directory_fd)
                else:
                    self.fd = os.open(self._temporary, flags, mode, dir_fd=self._directory_fd)
                return
            except FileExistsError:
                continue

    def _take_over_ownership(self) -> None:
        existing = self._target.existing
        if existing is None:
            return
        ours = os.fstat(self.fd)
        if (ours.st_uid, ours.st_gid) != (existing.st_uid, existing.st_gid):
            with contextlib.suppress(PermissionError):  # as a new file of ours then, like any editor's
                os.fchown(self.fd, existing.st_uid, existing.st_gid)
        if stat.S_IMODE(ours.st_mode) != stat.S_IMODE(existing.st_mode):
            os.fchmod(self.fd, stat.S_IMODE(existing.st_mode))

    def _abandon(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            with contextlib.suppress(OSError):
                os.close(fd)
        if self._temporary:
            self._remove_temporary()
            self._temporary = ""
        if self._directory_fd >= 0:
            directory_fd, self._directory_fd = self._directory_fd, -1
            os.close(directory_fd)

    def _remove_temporary(self) -> None:
        with contextlib.suppress(OSError):
            _remove(self._temporary, self._directory_fd, self._directory)

    @contextlib.contextmanager
    def _naming_target(self):  # type: ignore[no-untyped-def]
        """System errors carry the path that the caller gave, not the temporary's."""
        try:
            yield
        except OSError as e:
            if e.errno is not None:
                e.filename, e.filename2 = self._target.given, None
            raise


def _open_directory(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        if not hasattr(os, "O_PATH"):
            raise
        # Searchable and writable but not readable: good for all but fsync.
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _sync_directory(directory_fd: int) -> None:
    try:
        os.fsync(directory_fd)
    except OSError as e:
        if e.errno == errno.EBADF:  # O_PATH
            os.sync()
        elif e.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems on which directories need no fsync
            raise


def _remove(name: str, directory_fd: int, directory: str) -> None:
    try:
        os.unlink(name, dir_fd=directory_fd)
    except (IsADirectoryError, PermissionError):
        shutil.rmtree(os.path.join(directory, name))


# --- Temporaries' names: .<target's name, cut>.<hash of it>.<owner>.<serial>.sdio-tmp


def _temporary_prefix(name: str) -> str:
    encoded = os.fsencode(name)
    digest = hashlib.blake2b(encoded, digest_size=8).hexdigest()
    return f".{os.fsdecode(encoded[:_READABLE_NBYTES])}.{digest}."


def _temporary_name(name: str) -> str:
    return f"{_temporary_prefix(name)}{_owner(os.getpid())}.{next(_serial):x}-{os.urandom(4).hex()}{_SUFFIX}"


@functools.cache
def _machine() -> str:
    """Host and boot, so that a process id means something."""
    host = socket.gethostname() + _read("/etc/machine-id")
    boot = _read("/proc/sys/kernel/random/boot_id")
    return "-".join(hashlib.blake2b(part.encode(), digest_size=4).hexdigest() for part in (host, boot))


@functools.cache
def _owner(pid: int) -> str:
    """The process ``pid`` of this machine; the cache is per process id, so that a forked child has a name of its own."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{_machine()}-{namespace:x}-{pid:x}-{_start_time(pid):x}"


def _start_time(pid: int) -> int:
    """In clock ticks since boot; 0 where there is no /proc."""
    try:
        return int(_read(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])
    except (IndexError, ValueError):
        return 0


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""


def _remove_leftovers(directory_fd: int, directory: str, name: str) -> None:
    """Removes this target's temporaries whose owner is gone. Never an error: they are in nobody's way."""
    prefix = _temporary_prefix(name)
    with contextlib.suppress(OSError):
        for entry in os.listdir(directory_fd):
            if entry.startswith(prefix) and entry.endswith(_SUFFIX) and _is_abandoned(entry[len(prefix) :], entry, directory_fd):
                with contextlib.suppress(OSError):
                    _remove(entry, directory_fd, directory)


def _is_abandoned(owner_and_serial: str, entry: str, directory_fd: int) -> bool:
    owner = owner_and_serial.split(".")[0]
    try:
        host, boot, namespace, pid, start = owner.split("-")
    except ValueError:
        return False
    our_host, our_boot, our_namespace, our_pid, _ = _owner(os.getpid()).split("-")
    if host != our_host or (boot == our_boot and namespace != our_namespace):
        # A machine or container whose processes cannot be seen from here. A save that lives changes its temporary all the time.
        age = time.time() - os.stat(entry, dir_fd=directory_fd, follow_symlinks=False).st_mtime
        return age > _FOREIGN_LEFTOVER_SECONDS
    if boot != our_boot:
        return True
    if pid == our_pid:
        return _start_time(os.getpid()) != int(start, 16)
    try:
        os.kill(int(pid, 16), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return _start_time(int(pid, 16)) != int(start, 16)
