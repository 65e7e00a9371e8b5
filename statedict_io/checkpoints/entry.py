"""A checkpoint that is there, as users see it."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptCheckpointError, StateDictIOError
from . import soundness
from .facts import Facts, read_facts
from .folder import Folder, Listed
from .leases import Lease
from .soundness import Unsound, Vanished, Verify, checked_level


@dataclass(frozen=True)
class SkippedCheckpoint:
    """What was passed over in the search for a sound checkpoint."""

    step: int
    path: str
    reason: str  #: for people; names the path


class SavedCheckpoint:
    """A checkpoint of a :class:`CheckpointDirectory`. What is known of it is read when it is first asked for.

    Attributes:
        step: of its name.
        path: absolute, or a URL: a file of ``torch.save``, which anything may read.
        skipped: newer (for ``best()``: better) checkpoints that were passed over because they are damaged.
    """

    def __init__(self, folder: Folder, name: str, step: int, skipped: Sequence[SkippedCheckpoint] = ()) -> None:
        self.step = step
        self.path = folder.path_of(name)
        self._shown = folder.shown(name)  # without the password of a URL
        self.skipped = list(skipped)
        self._folder = folder
        self._name = name

    def __repr__(self) -> str:
        return f"<SavedCheckpoint step {self.step}: {self._shown!r}>"

    @functools.cached_property
    def _facts(self) -> Facts:
        return read_facts(self._folder, self._name)

    @property
    def metric(self) -> float | None:
        """As given to ``save``; None where it was not, or nobody knows."""
        return self._facts.metric

    @property
    def time(self) -> float | None:
        """When its save began, in seconds since the epoch; None where nobody knows."""
        return self._facts.time

    @property
    def wall_clock(self) -> str | None:
        """The same moment in ISO 8601, with the time zone of the process that saved."""
        return self._facts.wall_clock

    @property
    def sha256(self) -> str | None:
        """Of the file's bytes, in hex, where ``save`` was asked to note it."""
        return self._facts.sha256

    @property
    def protected(self) -> bool:
        """Whether no rule deletes it, as after :meth:`CheckpointDirectory.protect`."""
        return self._facts.protected

    @property
    def nbytes(self) -> int:
        """Size of the file, in bytes.

        Raises:
            FileNotFoundError: it has been deleted since it was found.
        """
        return self._size_and_time()[0]

    @property
    def saved_at(self) -> float | None:
        """:attr:`time`, or else when the file was written last, in seconds since the epoch."""
        return self._size_and_time()[1] if self.time is None else self.time

    def _size_and_time(self) -> tuple[int, float | None]:
        found = self._folder.nbytes_and_time(self._name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._shown)
        return found

    def problem(self, *, verify: Verify = "crc", backend: str = "auto") -> str | None:
        """What is wrong with it, for people; None: nothing that ``verify`` asks for.

        Args:
            verify, backend: as for :meth:`CheckpointDirectory.latest`.

        Raises:
            FileNotFoundError: it has been deleted since it was found.
            OSError: something that says nothing about the checkpoint, such as too many open files.
        """
        try:
            soundness.check(self._folder, Listed(self._name, "file", ""), checked_level(verify), backend=backend)
        except Unsound as e:
            return str(e)
        except Vanished as e:
            raise e.error from None
        return None

    def check_digest(self) -> None:
        """Compares the hash of the file's bytes with the one that ``save`` has noted, if it has.

        Raises:
            CorruptCheckpointError: they differ.
            FileNotFoundError: it has been deleted since it was found.
            OSError: it cannot be read.
        """
        with self.lease():
            try:
                soundness.check_digest(self._folder, self._name)
            except Unsound as e:
                raise CorruptCheckpointError(str(e)) from None

    def load(self, map_location: Any = None, **options: Any) -> Any:
        """What was saved; the checkpoint is not deleted meanwhile.

        Args:
            map_location: as for :func:`load`.
            options: of :func:`load`.

        Raises:
            FileNotFoundError: it has been deleted since it was found: ask for the newest one again.
            Exception: what :func:`load` raises.
        """
        from ..reading.loading import load

        with self.lease():
            return load(self.path, map_location, **options)

    def lease(self) -> AbstractContextManager[object]:
        """A context manager: in its block no ``CheckpointDirectory`` deletes the checkpoint, neither of this process
        nor, where the file system has locks, of another.

        Raises:
            FileNotFoundError: on entering: it has been deleted since it was found.
        """
        return Lease(self._folder, self._name)

    def load_into(self, state_dict: dict[str, Any], **options: Any) -> None:
        """Has every rank read its part into the tensors of ``state_dict``: a collective call,
        ``torch.distributed.checkpoint.load`` with a :class:`~statedict_io.dcp.SingleFileReader`.

        Args:
            state_dict: as for ``torch.distributed.checkpoint.load``.
            options: of ``torch.distributed.checkpoint.load``, such as ``process_group``.
        """
        if not self._folder.is_local:
            raise StateDictIOError(
                f"{self._shown}: many ranks read from a file system that they share, not from a store"
            )
        import torch.distributed.checkpoint as dcp

        from ..dcp import SingleFileReader

        dcp.load(state_dict, storage_reader=SingleFileReader(self.path), **options)
