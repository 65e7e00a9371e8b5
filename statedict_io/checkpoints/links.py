"""Symlinks ``latest`` and ``best`` beside the checkpoints, replaced atomically."""

from __future__ import annotations

import contextlib
import errno
import os

from ..writing.temporary_names import TemporaryNames

LATEST, BEST = "latest", "best"
BOTH = (LATEST, BEST)


def point(directory: str, link: str, name: str) -> None:
    """Has ``link`` lead to ``name``, both in ``directory``.

    Raises:
        OSError: it leads to where it led before; or something else has this name, and stays.
    """
    path = os.path.join(directory, link)
    if leads_to(directory, link) == name:
        return
    if os.path.lexists(path) and not os.path.islink(path):
        raise FileExistsError(errno.EEXIST, "something that is not a link has this name", path)
    temporary = os.path.join(directory, TemporaryNames(link, link).new(for_torch=False))
    os.symlink(name, temporary)
    try:
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def remove(directory: str, link: str) -> None:
    """
    Raises:
        OSError: it stays.
    """
    os.unlink(os.path.join(directory, link))


def leads_to(directory: str, link: str) -> str | None:
    """None where there is no such link."""
    try:
        return os.readlink(os.path.join(directory, link))
    except OSError:
        return None
