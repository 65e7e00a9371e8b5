"""A path that other code opens once more, while it is replaced: torch maps a file by its path, not as it was opened."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any


class Replaced(Exception):
    """The path is no longer that of the file that was opened first."""


@contextlib.contextmanager
def opened_again(file: Any, path: Any) -> Iterator[Callable[[], None]]:
    """For a block in which other code opens ``path`` once more and has to get ``file``, which is open already.

    Gives the block a function to be called when the path has been opened; what is raised afterwards, or happens to the
    path, is of no concern here. Where it is not called, that is at the end of the block.

    Raises:
        Replaced: by that function, or instead of what the block raised.
    """
    settled = False

    def settle() -> None:
        nonlocal settled
        if not _is_at(file, path):
            raise Replaced
        settled = True

    try:
        yield settle
    except Exception:
        if settled or _is_at(file, path):
            raise
        raise Replaced from None
    if not settled:
        settle()


def _is_at(file: Any, path: Any) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
