"""Has the installed ``torch.save`` write: the legacy format, and every zip on a torch whose format ours does not
reproduce. So a new torch can make saves slow, never wrong.

A zip is written inside a private directory beside the target, where it can have its final name, and committed as
others are. The legacy format is pickled while it is written, into a file object of ours that shows torch no descriptor.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from typing import Any

from ..installed.stock import torch_save
from ..progress import ProgressCallback
from ..system.pacing import paced
from .places import OpenFile, write_file
from .targets import FileTarget, Target

_PIECE_NBYTES = 1 << 20


def save_zip(
    obj: Any,
    target: Target,
    *,
    durable: bool,
    atomic: bool | None = True,
    is_superseded: Callable[[], bool] = lambda: False,
    **torch_options: Any,
) -> OSError | None:
    """Has torch open and write ``target``, or a file that then takes its place; its errors are torch's.

    Args:
        obj, target, durable: as in :func:`statedict_io.save`, after its resolution.
        atomic, is_superseded: as of :func:`~statedict_io.writing.places.write_file`, whose result this returns.
        torch_options: of ``torch.save``.
    """
    if not isinstance(target, FileTarget):
        torch_save(obj, target.given, **torch_options)
        return None

    # In a directory of its own the file can have its final name, from which torch takes the archive's.
    def write(file: OpenFile) -> None:
        torch_save(obj, file.path_inside, **torch_options)

    return write_file(target, write, durable=durable, atomic=atomic, is_superseded=is_superseded, as_directory=True)


class ZipFile:
    """What torch writes under a file name, as :class:`~statedict_io.backends.protocol.Content`; by way of a temporary
    file, because torch takes the archive's name from the file that it opens."""

    in_any_order = False

    def __init__(self, obj: Any, file_name: str, **torch_options: Any) -> None:
        self._obj = obj
        self._file_name = file_name
        self._options = torch_options

    def write_fd(
        self, fd: int, *, durable: bool, progress: ProgressCallback | None, bytes_per_second: float | None = None
    ) -> None:
        raise NotImplementedError("a file is torch's to open and write")

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        del progress
        with tempfile.TemporaryDirectory(prefix="statedict_io-") as directory:
            path = os.path.join(directory, self._file_name)
            torch_save(self._obj, path, **self._options)
            with open(path, "rb", buffering=0) as file:
                while piece := file.read(_PIECE_NBYTES):
                    write(memoryview(piece))


class LegacyFile:
    """The format before torch 1.6 as :class:`~statedict_io.backends.protocol.Content`; pickled while it is written."""

    in_any_order = False

    def __init__(self, obj: Any, **torch_options: Any) -> None:
        self._obj = obj
        self._options = torch_options

    def write_fd(
        self, fd: int, *, durable: bool, progress: ProgressCallback | None, bytes_per_second: float | None = None
    ) -> None:
        del durable  # the commit's affair

        def write(data: memoryview) -> None:
            left = memoryview(data)
            while left:
                written = os.write(fd, left)
                if written == 0:
                    raise OSError(errno.EIO, "write wrote nothing")
                left = left[written:]

        self.write_stream(paced(write, bytes_per_second), progress=progress)

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        del progress  # the size is known when the last byte is
        torch_save(self._obj, _WriteOnly(write), **self._options, _use_new_zipfile_serialization=False)


class _WriteOnly:
    """A file without a descriptor: past one that has it torch writes storages from C++, and errors lose their errno."""

    def __init__(self, write: Callable[[memoryview], Any]) -> None:
        self._write = write

    def write(self, data: bytes | memoryview) -> int:
        self._write(memoryview(data))
        return len(data)

    def flush(self) -> None:
        """Nothing is held back here."""
