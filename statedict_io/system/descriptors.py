"""File descriptors: opened, read and written at offsets and synced alike on all systems.

None is ever 0, 1 or 2: where a process has closed these three, the system gives their numbers to whatever is opened
next, and what any library prints would go into a checkpoint. None is inherited by other programs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_FIRST_AFTER_STANDARD = 3
#: what a system says that does not know a call, or not for this kind of file
NOT_IMPLEMENTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

# Flags of os.open, 0 on systems that do without.
NOFOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
NONBLOCK: int = getattr(os, "O_NONBLOCK", 0)
DIRECTORY: int = getattr(os, "O_DIRECTORY", 0)
_BINARY: int = getattr(os, "O_BINARY", 0)  # else Windows writes a byte more for each line's end

_position_lock = threading.RLock()


def open_file(path: str | bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    """As :func:`os.open`, but never descriptor 0, 1 or 2, and for bytes, not text."""
    fd = os.open(path, flags | _BINARY, mode, dir_fd=dir_fd)
    if fd >= _FIRST_AFTER_STANDARD:
        return fd
    standard = [fd]
    try:
        if fcntl is not None:
            return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_AFTER_STANDARD)
        while (fd := os.dup(fd)) < _FIRST_AFTER_STANDARD:
            standard.append(fd)
        return fd
    finally:
        for each in standard:
            os.close(each)


@contextlib.contextmanager
def descriptor_of(path: str | bytes, flags: int) -> Iterator[int]:
    """The descriptor of :func:`open_file`, closed at the end of the block."""
    fd = open_file(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _positioned(fd: int, offset: int) -> Iterator[None]:
    """For systems that read and write at a descriptor's own position alone, which a file object of Python's relies on
    and all threads share."""
    with _position_lock:
        before = os.lseek(fd, 0, os.SEEK_CUR)
        try:
            os.lseek(fd, offset, os.SEEK_SET)
            yield
        finally:
            os.lseek(fd, before, os.SEEK_SET)


def read_at(fd: int, nbytes: int, offset: int) -> bytes:
    """As :func:`os.pread`."""
    if hasattr(os, "pread"):
        return os.pread(fd, nbytes, offset)
    with _positioned(fd, offset):
        return os.read(fd, nbytes)


def read_into(fd: int, destination: memoryview, offset: int) -> int:
    """Reads into ``destination`` what one call gives, and returns the number of bytes: 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [destination], offset)
    data = read_at(fd, min(len(destination), _COPIED_NBYTES), offset)
    destination[: len(data)] = data
    return len(data)


_COPIED_NBYTES = 1 << 20


def write_at(fd: int, data: memoryview | bytes | bytearray, offset: int) -> int:
    """As :func:`os.pwrite`."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _positioned(fd, offset):
        return os.write(fd, data)


def write_all_at(fd: int, data: memoryview | bytes | bytearray, offset: int) -> None:
    """Writes all of ``data``.

    Raises:
        OSError: what the system reported; EIO where it takes nothing.
    """
    left = memoryview(data)
    while left:
        written = write_at(fd, left, offset)
        if written == 0:
            raise OSError(errno.EIO, "pwrite wrote nothing")
        offset += written
        left = left[written:]


def write_all(fd: int, data: memoryview) -> None:
    """The same at the descriptor's own position."""
    while data:
        written = os.write(fd, data)
        if written == 0:
            raise OSError(errno.EIO, "write wrote nothing")
        data = data[written:]


def sync(fd: int) -> None:
    """Has what was written on the device; a file system that knows no such call keeps what promises it can.

    On macOS fsync() stops at the drive, whose cache a power cut empties: F_FULLFSYNC does not (man 2 fsync). Windows'
    is FlushFileBuffers, which wants a descriptor that may write.
    """
    if fcntl is not None and hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError as e:  # a file system, such as one of the network, that has no such thing
            if e.errno not in (errno.EINVAL, errno.ENOTTY, *NOT_IMPLEMENTED):
                raise
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, *NOT_IMPLEMENTED):
            raise
