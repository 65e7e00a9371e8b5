"""Handing all of a piece of data to a file object, whose ``write`` may take less."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from typing import Any


def full_writer(file: Any) -> Callable[[bytes | memoryview], None]:
    """A function that writes all of what it is given to ``file``, as what it is: some files take ``bytes`` alone.

    Raw files (:class:`io.RawIOBase`) tell how many bytes they took, which may be fewer than they were given: Linux
    takes at most 2 GiB a call. What other objects return means nothing, as for ``torch.save``: a compressing file may
    return the size of what it compressed to, or nothing at all.

    Raises (from the function):
        BlockingIOError: a raw file in non-blocking mode had no room.
        OSError: a raw file took nothing (EIO).
    """
    write = file.write
    if not isinstance(file, io.RawIOBase):
        return write

    def write_all(data: bytes | memoryview) -> None:
        done = 0
        while done < len(data):
            taken = write(data[done:])
            if taken is None and _is_non_blocking(file):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), done)
            if isinstance(taken, bool) or not isinstance(taken, int) or not 0 <= taken < len(data) - done:
                return
            if taken == 0:
                raise OSError(errno.EIO, "write wrote nothing")
            done += taken

    return write_all


def _is_non_blocking(file: io.RawIOBase) -> bool:
    try:
        return not os.get_blocking(file.fileno())
    except (AttributeError, OSError):  # no descriptor, or a system without this question
        return False
