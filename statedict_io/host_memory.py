"""How much memory this process may use."""

from __future__ import annotations

import functools
import os
import sys

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@functools.cache
def limit_nbytes() -> int:
    """The machine's memory, or the container's share of it."""
    limits = [_nbytes_in(path) for path in _CGROUP_LIMITS]
    try:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # not a system that says
        limits.append(0)
    return min((limit for limit in limits if limit > 0), default=sys.maxsize)


def _nbytes_in(path: str) -> int:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):  # no such limit; "max" where there is none
        return 0
