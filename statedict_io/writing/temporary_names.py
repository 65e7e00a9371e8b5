"""Names of temporaries: ``.<the target's name, cut>.<random>.sdio-tmp``. Hidden, never ``*.pt``, and short enough for
every file system; no two are the same.

torch names an archive after the file that it opens, less its last suffix. A temporary that torch is to open is
``<the archive's name>.<random>-sdio-tmp``.
"""

from __future__ import annotations

import functools
import os
import re

_READABLE_NBYTES = 60  # of the target's name, so that a leftover tells what it was to become
_MAX_ARCHIVE_NAME_NBYTES = 230  # the rest makes a file's name of 252 bytes
_RANDOM_NBYTES = 6  # not the 8 of remote/uploads.py, whose temporaries nobody locks
_NEW = re.compile(r"[0-9a-f]{12}\.sdio-tmp")
_FOR_TORCH = re.compile(r"[0-9a-f]{12}-sdio-tmp")
# Of earlier versions, which locked nothing: <CRC-32 of the name>.<host, boot, pid namespace, pid, start>.<number>
_OLD = re.compile(r"[0-9a-f]{8}\.[0-9a-f]+(-[0-9a-f]+){4}\.[0-9a-f]+-[0-9a-f]+\.sdio-tmp")

_ANY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.sdio-tmp|(.+)\.[0-9a-f]{12}-sdio-tmp", re.DOTALL)


class TemporaryNames:
    """Those of one target. Targets whose long names begin alike share them, and so do those whose archives have one
    name."""

    def __init__(self, name: str, archive_name: str) -> None:
        self._prefix = _prefix_of(name)
        self._archive_name = archive_name

    @property
    def can_name_archive(self) -> bool:
        """Whether there can be one after which torch names the archive right."""
        return len(os.fsencode(self._archive_name)) <= _MAX_ARCHIVE_NAME_NBYTES

    def new(self, *, for_torch: bool) -> str:
        random = os.urandom(_RANDOM_NBYTES).hex()
        return f"{self._archive_name}.{random}-sdio-tmp" if for_torch else f"{self._prefix}{random}.sdio-tmp"

    def has(self, name: str) -> bool:
        return bool(
            self._matches(_NEW, name)
            or self._matches(_OLD, name)
            or (name.startswith(f"{self._archive_name}.") and _FOR_TORCH.fullmatch(name, len(self._archive_name) + 1))
        )

    def are_locked(self, name: str) -> bool:
        """Whether the writer of a temporary locks it, where that can be done."""
        return not self._matches(_OLD, name)

    def _matches(self, pattern: re.Pattern[str], name: str) -> bool:
        return name.startswith(self._prefix) and pattern.fullmatch(name, len(self._prefix)) is not None


def target_of(name: str) -> str | None:
    """The name, cut where it is long, of the target of a temporary, or of its archive, if torch was to open it; None of
    what is no temporary."""
    found = _ANY.fullmatch(name)
    return None if found is None else found[1] or found[2]


@functools.lru_cache(maxsize=64)  # many saves go to one path
def _prefix_of(name: str) -> str:
    readable = name[:_READABLE_NBYTES]
    while not readable.isascii() and len(os.fsencode(readable)) > _READABLE_NBYTES:
        readable = readable[:-1]  # by characters: some file systems refuse half of one
    return f".{readable}."
