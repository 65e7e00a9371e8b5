"""What a backend is: a module with ``name`` and ``plan``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..progress import ProgressCallback

#: name and content; an int is the size of a hole, which ``skip_data`` leaves
Record = tuple[str, "bytes | torch.UntypedStorage | int"]


class Archive(Protocol):
    """A planned archive. Nothing has been written; all sizes are known."""

    @property
    def nbytes(self) -> int:
        """Of the whole file."""

    def write_fd(self, fd: int, *, durable: bool, progress: ProgressCallback | None) -> None:
        """Writes the archive into an empty file.

        ``durable`` says that an fsync will follow, which decides between direct and buffered writes; it is the caller who makes it.
        """

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        """Hands the archive to ``write`` from front to back. ``write`` must take all of what it is given."""


class Backend(Protocol):
    name: str

    def plan(self, archive_name: str, records: list[Record], *, alignment: int, compute_crc32: bool) -> Archive: ...
