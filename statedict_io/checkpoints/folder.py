"""The directory as the rest of this room sees it: names, small files, removal; in a file system or in a store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

PIECE_NBYTES = 1 << 20


class Listed(NamedTuple):
    """A name in a folder."""

    name: str
    kind: Literal["file", "link", "other"]
    identity: str  #: differs from that of another file that had the name before, as far as a listing tells


class Folder(Protocol):
    """All methods raise the OSError that the system or the store reports, with the path."""

    path: str  #: absolute, or a URL without its password: for people
    identity: str  #: equal for all names of the folder
    is_local: bool

    def listed(self) -> list[Listed]:
        """Everything in it; nothing where there is no folder."""
        ...

    def path_of(self, name: str) -> str:
        """To open it by."""
        ...

    def shown(self, name: str) -> str:
        """As errors and warnings have it: :attr:`path` and the name."""
        ...

    def version(self, name: str) -> str | None:
        """Differs whenever the content does; None where nothing has the name."""
        ...

    def nbytes_and_time(self, name: str) -> tuple[int, float | None] | None:
        """Size, and when it was written, in seconds since the epoch; None where nothing has the name."""
        ...

    def read(self, name: str, max_nbytes: int) -> bytes | None:
        """The file's content; None where there is none, or it is larger."""
        ...

    def pieces(self, name: str) -> Iterator[bytes]:
        """The file's content, from front to back."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Replaces the file as a whole. What was written may not survive a power loss before :meth:`sync`."""
        ...

    def sync(self, name: str, *, also_name: bool) -> None:
        """Returns when the file's content survives a power loss; with ``also_name`` that it has this name too."""
        ...

    def create(self, *, durable: bool) -> None:
        """Makes the folder, and those above it, where they are missing."""
        ...

    def remove(self, name: str) -> None:
        """Of a file or a link; nothing happens where nothing has the name."""
        ...

    def remove_leftovers(self, names: list[str], *, fresh: str | None) -> None:
        """Removes those of ``names``, of temporaries, whose writers are gone. Never an error.

        Args:
            fresh: a file that has just been written, by which the others' age is told; None: nobody but this process
                writes here, and these are not its own: age does not matter.
        """
        ...
