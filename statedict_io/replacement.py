"""Atomic, durable replacement of a file: whoever looks, at whatever instant, finds the old file or the new one, whole.

Both backends write through this. Order on the device: write, fsync, close, rename, fsync of the directory. The
temporary lies in the target's directory, because a rename is atomic within one file system only.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import os
import socket
import stat
import time
import zlib
from collections.abc import Callable
from types import TracebackType

from .descriptors import open_file
from .processes import in_forked_child
from .targets import FileTarget

_SUFFIX = ".sdio-tmp"
_READABLE_NBYTES = 60  # of the target's name, so that a leftover tells what it was to become
_MAX_NAMES = 100  # tried: one that is taken is rarer than a file system that says so of all
_FOREIGN_LEFTOVER_SECONDS = 24 * 3600
_NOT_IMPLEMENTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
# A directory that takes no new names, or not such as ours.
_MAY_REFUSE_NAMES = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, *_NOT_IMPLEMENTED}
# Nor lets go of an old one: it is another's in a sticky directory, a mount point, or the file system cannot.
_MAY_REFUSE_RENAME = {*_MAY_REFUSE_NAMES, errno.EBUSY, errno.EXDEV}
_serial = itertools.count()


class Replacement:
    """A temporary that becomes ``target`` on :meth:`commit` and vanishes otherwise.

    Use as a context manager, from one thread. ``fd`` is the temporary's descriptor, open for writing at offset 0.

    Args:
        target: what to replace; stays open.
        durable: fsync the file and its directory.
        as_directory: make a private directory instead, for a writer that opens files by path: it writes
            ``path_inside``. ``fd`` is not set.
    """

    fd = -1
    _inside_fd = -1  # of the private directory
    _temporary = ""
    is_refused = False  #: it is the place that takes no replacement; what was raised says how it can be written
    was_refused_at_the_end = False  #: only after everything had been written

    def __init__(self, target: FileTarget, *, durable: bool, as_directory: bool = False) -> None:
        self.target = target
        self._durable = durable
        self._as_directory = as_directory
        self._directory = target.directory
        self._prefix = _temporary_prefix(target.name)
        self._process = os.getpid()

    @property
    def paths(self) -> list[str]:
        """The temporary's, for other processes that write into it: as :meth:`Directory.paths_of`."""
        return self._directory.paths_of(self._temporary)

    @property
    def path_inside(self) -> str:
        directory = f"/proc/self/fd/{self._inside_fd}"
        if not os.path.isdir(directory):
            directory = os.path.join(self._directory.path, self._temporary)
        return os.path.join(directory, self._name_inside)

    @property
    def _name_inside(self) -> str:
        # torch takes the archive's name from an ASCII path, and none from another.
        given = self.target.given
        return os.path.basename(given) if given.isascii() else "é"

    def __enter__(self) -> Replacement:
        try:  # a signal's exception can come up in any of the calls within
            _remove_leftovers(self._directory.fd, self._prefix)
            self._create()
        except BaseException as e:
            self.abandon()
            if isinstance(e, OSError) and e.errno in _MAY_REFUSE_NAMES:
                self._refuse(e, at_the_end=False)
            self._name_target_in(e)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, OSError) and error.errno is not None and self._is_ours(error.filename):
                error.filename = self.target.given
        finally:
            self.abandon()

    def __del__(self) -> None:
        self.abandon()  # for a signal's exception that came up on the way into __exit__

    def start_again(self) -> None:
        """Goes on with an empty temporary."""
        self.abandon()
        try:
            self._create()
        except OSError as e:
            self._name_target_in(e)
            raise

    def commit(self, is_superseded: Callable[[], bool] = lambda: False) -> None:
        """Puts the temporary in the target's place, unless ``is_superseded``, which is asked last of all. On an error
        the target is untouched, unless it is the last fsync that fails: then the new file is there, and what may not
        survive a power loss is its name."""
        try:
            source, source_directory_fd = self._temporary, self._directory.fd
            if self._as_directory:
                source, source_directory_fd = self._name_inside, self._inside_fd
                self.fd = open_file(source, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=source_directory_fd)
            self._take_over_ownership()
            if self._durable:
                sync(self.fd)
            # Closed first: close can report a write error (NFS, quota), and some network mounts refuse to rename an
            # open file.
            fd, self.fd = self.fd, -1
            os.close(fd)
            if is_superseded():
                return
            try:
                os.rename(source, self.target.name, src_dir_fd=source_directory_fd, dst_dir_fd=self._directory.fd)
            except OSError as e:
                if e.errno in _MAY_REFUSE_RENAME:
                    self._refuse(e, at_the_end=True)
                raise
            if self._as_directory:
                self._remove_temporary()
            self._temporary = ""
            if self._durable:
                sync_directory(self._directory.fd)
        except OSError as e:
            self._name_target_in(e)
            raise

    def _refuse(self, error: OSError, *, at_the_end: bool) -> None:
        self.is_refused, self.was_refused_at_the_end = True, at_the_end
        if at_the_end or self.target.existing is not None:  # a new file cannot be created under its own name either
            error.strerror = (
                f"{error.strerror}: the file cannot be replaced here; atomic=False (on the command line: --in-place) "
                "writes into the file itself"
            )
            error.args = (error.errno, error.strerror)  # which a pickled error is made of, on its way between ranks

    def _create(self) -> None:
        existing = self.target.existing
        # A new file's mode is 0666 less the umask, which open() applies. What replaces a file is its owner's alone
        # until it has that file's group.
        mode = 0o666 if existing is None else stat.S_IMODE(existing.st_mode) & 0o600
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        for attempt in range(1, _MAX_NAMES + 1):
            self._temporary = _temporary_name(self._prefix)
            try:
                if self._as_directory:
                    os.mkdir(self._temporary, 0o700, dir_fd=self._directory.fd)
                    self._inside_fd = open_file(
                        self._temporary,
                        os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                        dir_fd=self._directory.fd,
                    )
                else:
                    self.fd = open_file(self._temporary, flags, mode, dir_fd=self._directory.fd)
                return
            except FileExistsError:
                self._temporary = ""  # another's: not to be removed
                if attempt == _MAX_NAMES:
                    raise

    def _take_over_ownership(self) -> None:
        existing = self.target.existing
        if existing is None:
            return
        ours, user, group = os.fstat(self.fd), existing.st_uid, existing.st_gid
        mode = stat.S_IMODE(existing.st_mode)
        if (ours.st_uid, ours.st_gid) != (user, group) and not _change_owner(self.fd, user, group):
            # A file of ours then, like any editor's; in the old one's group if we are in it.
            mode &= 0o777
            if ours.st_gid != group and not _change_owner(self.fd, -1, group):
                # What the old group might do is not for ours, which may be larger: no more than everybody may.
                mode &= 0o707 | (mode & 0o007) << 3
        if stat.S_IMODE(ours.st_mode) != mode:
            _change_mode(self.fd, stat.S_IMODE(ours.st_mode), mode)

    def abandon(self) -> None:
        """Ends the replacement; the temporary goes. Again, or after the commit: does nothing."""
        # Each step also if a signal's exception ends the one before. Between taking a descriptor and closing it there
        # is no call, and so no look for signals. Nothing more depends on either descriptor: errors do not matter.
        try:
            if self.fd >= 0:
                fd, self.fd = self.fd, -1
                try:  # noqa: SIM105
                    os.close(fd)
                except OSError:
                    pass
        finally:
            try:
                if self._temporary:
                    self._remove_temporary()
                    self._temporary = ""
            finally:
                if self._inside_fd >= 0:
                    inside_fd, self._inside_fd = self._inside_fd, -1
                    try:  # noqa: SIM105
                        os.close(inside_fd)
                    except OSError:
                        pass

    def _is_ours(self, filename: object) -> bool:
        """Whether an error's filename says nothing, or the temporary's name, which the caller has never heard of."""
        if filename is None:
            return True
        ours = self.path_inside if self._as_directory else self._temporary
        return self._temporary != "" and ours in str(filename)

    def _remove_temporary(self) -> None:
        if os.getpid() != self._process or self._directory.fd < 0:  # a child that was forked in the middle
            return
        if self._as_directory and self._inside_fd >= 0:  # there may be no descriptor to be had
            with contextlib.suppress(OSError):
                os.unlink(self._name_inside, dir_fd=self._inside_fd)
        try:
            _remove(self._temporary, self._directory.fd)
        except OSError:  # it stays then, but takes no room
            with contextlib.suppress(OSError):
                flags = os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                os.close(os.open(self._temporary, flags, dir_fd=self._directory.fd))

    def _name_target_in(self, error: BaseException) -> None:
        """System errors carry the path that the caller gave, not the temporary's."""
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = self.target.given
            if error.filename2 is not None:
                del error.filename2  # None would be shown


def _change_owner(fd: int, user: int, group: int) -> bool:
    """False where that is not ours to do; EINVAL and EOVERFLOW are the answers about users that this container does not
    know."""
    try:
        os.fchown(fd, user, group)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.EINVAL, errno.EOVERFLOW, *_NOT_IMPLEMENTED):
            raise
        return False
    return True


def _change_mode(fd: int, current: int, mode: int) -> None:
    try:
        os.fchmod(fd, mode)
    except OSError as e:
        # It is our own file: this file system changes no modes. Fewer rights will do, more will not.
        if e.errno not in (errno.EPERM, *_NOT_IMPLEMENTED) or current & ~mode:
            raise


def sync(fd: int) -> None:
    """Has what was written on the device; a file system that knows no such call keeps what promises it can."""
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, *_NOT_IMPLEMENTED):
            raise


def sync_directory(directory_fd: int) -> None:
    """Has the names in it on the device."""
    try:
        sync(directory_fd)
    except OSError as e:
        if e.errno != errno.EBADF:
            raise
        os.sync()  # opened with O_PATH


def _remove(name: str, directory_fd: int) -> None:
    try:
        os.unlink(name, dir_fd=directory_fd)
    except (IsADirectoryError, PermissionError):
        try:
            os.rmdir(name, dir_fd=directory_fd)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _remove_files_in(name, directory_fd)
            os.rmdir(name, dir_fd=directory_fd)


def _remove_files_in(name: str, directory_fd: int) -> None:
    inside_fd = open_file(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        for entry in os.listdir(inside_fd):
            os.unlink(entry, dir_fd=inside_fd)
    finally:
        os.close(inside_fd)


# --- Temporaries' names: .<target's name, cut>.<its CRC-32>.<owner>.<serial>-<nonce>.sdio-tmp
# Names that share the first two fields at worst clean up after each other.


@functools.lru_cache(maxsize=64)  # many saves go to one path
def _temporary_prefix(name: str) -> str:
    readable = name[:_READABLE_NBYTES]
    while not readable.isascii() and len(os.fsencode(readable)) > _READABLE_NBYTES:
        readable = readable[:-1]  # by characters: some file systems refuse half of one
    encoded = name.encode() if name.isascii() else os.fsencode(name)
    return f".{readable}.{zlib.crc32(encoded):08x}."


def _temporary_name(prefix: str) -> str:
    pid = os.getpid()
    return f"{prefix}{_owner(pid)}.{next(_serial):x}-{_nonce(pid)}{_SUFFIX}"


@functools.cache
def _machine() -> str:
    """Host and boot, so that a process id means something."""
    host = socket.gethostname() + _read("/etc/machine-id")
    boot = _read("/proc/sys/kernel/random/boot_id")
    return "-".join(hashlib.blake2b(part.encode(), digest_size=4).hexdigest() for part in (host, boot))


@functools.cache
def _owner(pid: int) -> str:
    """The process ``pid`` of this machine; a forked child has a name of its own."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{_machine()}-{namespace:x}-{pid:x}-{_start_time(pid):x}"


@functools.cache
def _nonce(pid: int) -> str:
    """For processes that cannot tell themselves apart, where /proc is hidden."""
    del pid
    return os.urandom(4).hex()


in_forked_child(_owner.cache_clear)  # a descendant can get the id of an ancestor that is gone
in_forked_child(_nonce.cache_clear)


def _start_time(pid: int) -> int:
    """In clock ticks since boot; 0 where it cannot be read; -1 of a process that ended and whose parent has not
    noticed."""
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        ended = fields[0] in ("Z", "X") and int(fields[17]) <= 1  # threads
        return -1 if ended else int(fields[19])
    except (IndexError, ValueError):
        return 0


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""


def _remove_leftovers(directory_fd: int, prefix: str) -> None:
    """Removes this target's temporaries whose owner is gone. Never an error: they are in nobody's way."""
    try:
        entries = os.listdir(directory_fd)
    except OSError:
        return
    for entry in entries:
        if entry.startswith(prefix) and entry.endswith(_SUFFIX):
            with contextlib.suppress(OSError):
                if _is_abandoned(entry[len(prefix) :], entry, directory_fd):
                    _remove(entry, directory_fd)


def _is_abandoned(owner_and_serial: str, entry: str, directory_fd: int) -> bool:
    try:
        host, boot, namespace, pid, start = owner_and_serial.split(".")[0].split("-")
        process, started = int(pid, 16), int(start, 16)
    except ValueError:  # not a name of ours
        return False
    our_host, our_boot, our_namespace, *_ = _owner(os.getpid()).split("-")
    if (host, boot, namespace) == (our_host, our_boot, our_namespace):
        return not _runs(process, started)
    # A machine or container whose processes cannot be seen from here. A save that lives changes its temporary all the
    # time.
    age = time.time() - os.stat(entry, dir_fd=directory_fd, follow_symlinks=False).st_mtime
    # This machine, before it was booted; if it is another of the same name, its temporary is younger than our boot.
    from_before_boot = host == our_host and boot != our_boot and age > _seconds_since_boot()
    return from_before_boot or age > _FOREIGN_LEFTOVER_SECONDS


def _seconds_since_boot() -> float:
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return float("inf") if clock is None else time.clock_gettime(clock)


def _runs(pid: int, started: int) -> bool:
    """Whether the process that had this id and start time is still there; True if that cannot be told."""
    if pid != os.getpid():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            pass
    now = _start_time(pid)
    return 0 in (now, started) or now == started
