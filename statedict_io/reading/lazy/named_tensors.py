"""What a :class:`~.checkpoint.Checkpoint` stands on: named tensors, whatever kind of file they are in.

There is a class for each kind: archives and legacy files, whose names come from what was saved in them
(:mod:`.object_tensors`), safetensors files (:mod:`.safetensors_tensors`), folders of shards (:mod:`.shards`).
:mod:`.opening` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ...progress import ProgressCallback


class Place(NamedTuple):
    """Where the bytes of a tensor are."""

    path: str  #: of the file
    record: str | None  #: that they are in, equal for tensors that may share some; None where they are in several
    offset: int | None  #: of the first byte in the file; None where they do not lie there as they are


class StoredObject(Protocol):
    """An object whose storages lie in a file. Errors as of :class:`NamedTensors`."""

    def made_on(self, take: Callable[[str, int], torch.UntypedStorage]) -> Any:
        """The object once more.

        Args:
            take: ``take(record, nbytes)`` gives the storage of a record, whose content does not matter; the same one
                each time.

        Raises:
            StateDictIOError: some of it cannot be made without data.
        """

    def pieces(self, record: str, piece_nbytes: int) -> Iterator[memoryview]:
        """The bytes of a record as this machine orders them, each valid until the next."""


class NamedTensors(Protocol):
    """May be used from several threads, :meth:`close` apart. Methods that take the name of a tensor raise

    - ``KeyError``: there is none of that name, or what is there cannot be made a tensor,
    - ``CorruptCheckpointError``: the file is damaged there,
    - ``OSError``: it cannot be read.
    """

    @property
    def path(self) -> str:
        """As given."""

    @property
    def nbytes(self) -> int:
        """Of the file, or of all."""

    @property
    def stored_object(self) -> StoredObject | None:
        """What was saved, where that is any object, of which the tensors are parts, and not named tensors alone."""

    def names(self) -> Collection[str]:
        """Of the tensors, in order."""

    def placeholder(self, name: str) -> torch.Tensor:
        """A tensor on the meta device with all that is known of one; where its kind needs data, it itself."""

    def place(self, name: str) -> Place: ...

    def tensor(self, name: str) -> torch.Tensor:
        """Read onto the CPU, into memory of its own."""

    def is_plain(self, name: str) -> bool:
        """Whether it is a plain tensor with data."""

    def has_views(self, name: str) -> bool:
        """Whether :meth:`view` can read parts of it."""

    def is_read_whole(self, name: str) -> bool:
        """Whether any part of it takes reading all of it, which is not kept."""

    def view(self, name: str, view: torch.Tensor) -> torch.Tensor:
        """``view``: of the placeholder of that name."""

    @property
    def others(self) -> Sequence[str]:
        """As of a checkpoint, like the three that follow."""

    @property
    def hidden(self) -> Sequence[str]: ...

    @property
    def refused(self) -> dict[str, tuple[str, ...]]: ...

    @property
    def metadata(self) -> dict[str, str]: ...

    def other_values(self) -> Iterator[tuple[str, Any]]:
        """:attr:`others`, with the values."""

    def facts(self) -> dict[str, Any]:
        """About the format, for people."""

    def check(self, progress: ProgressCallback | None = None) -> None:
        """Compares all checksums that there are.

        Raises:
            CorruptCheckpointError: one does not match.
        """

    def close(self) -> None:
        """What was read stays valid."""
