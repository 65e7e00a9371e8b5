"""File descriptors that nobody takes for standard input, output or error.

Where a process has closed these three, the system gives their numbers to whatever is opened next, and what any library
prints would go into a checkpoint.
"""

from __future__ import annotations

import os

_FIRST_AFTER_STANDARD = 3


def open_file(path: str | bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    """As :func:`os.open`, but never descriptor 0, 1 or 2."""
    fd = os.open(path, flags, mode, dir_fd=dir_fd)
    if fd >= _FIRST_AFTER_STANDARD:
        return fd
    try:
        import fcntl
    except ImportError:  # Windows, where descriptors are the C library's own
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_AFTER_STANDARD)
    finally:
        os.close(fd)
