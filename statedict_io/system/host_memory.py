"""How much memory this process may use, and how much of it is free: the machine's, and that of its control groups.

Of both versions of Linux's control groups, from the process's own up to the root that it can see: a limit holds for
all groups below (Documentation/admin-guide/cgroup-v1/memory.rst, cgroup-v2.rst). Looked up anew at each call, as limits
change while a process runs.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator

# By version: the limits of a group, what it uses, and the pages in that which the kernel can take back from files.
_LIMITS = {1: ["memory.limit_in_bytes"], 2: ["memory.max", "memory.high"]}
_USAGE = {1: "memory.usage_in_bytes", 2: "memory.current"}
_OF_FILES = {1: ("total_active_file", "total_inactive_file"), 2: ("active_file", "inactive_file")}


def limit_nbytes(root: str = "/") -> int:
    """The machine's memory, or the smallest share of it that a control group leaves."""
    limits = [_limit_of(directory, version) for directory, version in _control_groups(root)]
    return min([_physical_nbytes(), *limits])


def available_nbytes(root: str = "/") -> int:
    """What can be taken without swapping, before a control group's limit, the process's own (RLIMIT_AS) or the end of
    the machine's memory; files in the page cache count as free."""
    available = [_meminfo(root).get("MemAvailable", sys.maxsize), _address_space_left(root)]
    for directory, version in _control_groups(root):
        limit = _limit_of(directory, version)
        if limit < sys.maxsize:
            counts = _counts_in(os.path.join(directory, "memory.stat"))
            of_files = sum(counts.get(name, 0) for name in _OF_FILES[version])
            used = _number_in(os.path.join(directory, _USAGE[version]), 0)
            available.append(max(limit - max(used - of_files, 0), 0))
    return min(available)


def unthrottled_nbytes(root: str = "/") -> float:
    """Dirty bytes that the kernel takes before it starts to write back and then to throttle writers: a share of the
    available memory (Documentation/admin-guide/sysctl/vm.rst: dirty_background_ratio), also of a control group's."""
    of_machine = _meminfo(root).get("MemAvailable")
    if not of_machine:
        return float("inf")
    settings = os.path.join(root, "proc/sys/vm")
    nbytes = _number_in(os.path.join(settings, "dirty_background_bytes"), 0)
    ratio = _number_in(os.path.join(settings, "dirty_background_ratio"), -1)
    if nbytes == 0 and ratio < 0:
        return float("inf")
    share = nbytes / of_machine if nbytes else ratio / 100
    return share * available_nbytes(root)


def _control_groups(root: str) -> Iterator[tuple[str, int]]:
    """(directory, version) of the groups that this process's memory is charged to, the innermost first."""
    groups = _own_groups(os.path.join(root, "proc/self/cgroup"))
    for line in _lines_of(os.path.join(root, "proc/self/mountinfo")):
        fields, _, rest = line.partition(" - ")
        _, _, _, mounted, mount_point, *_ = fields.split(" ")
        kind, _, options = rest.split(" ")
        version = {"cgroup": 1, "cgroup2": 2}.get(kind, 0)
        if version not in groups or (version == 1 and "memory" not in options.split(",")):
            continue
        top = os.path.join(root, _unescaped(mount_point).lstrip("/"))
        # Where only a part of the hierarchy is mounted, as in a container: below that part, or outside of it.
        below = os.path.relpath(groups[version], _unescaped(mounted))
        names = [] if below == "." or below.startswith("..") else below.split("/")
        for depth in range(len(names), -1, -1):
            yield os.path.join(top, *names[:depth]), version


def _own_groups(path: str) -> dict[int, str]:
    """Version -> the group in its hierarchy: lines of hierarchy-id:controllers:path (man 7 cgroups)."""
    groups = {}
    for line in _lines_of(path):
        hierarchy, controllers, group = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            groups[2] = group
        elif "memory" in controllers.split(","):
            groups[1] = group
    return groups


def _unescaped(field: str) -> str:
    """Blanks and backslashes are octal numbers in mountinfo (man 5 proc)."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _limit_of(directory: str, version: int) -> int:
    return min(_number_in(os.path.join(directory, name), sys.maxsize) for name in _LIMITS[version])


def _physical_nbytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not a system that says
        return sys.maxsize


def _address_space_left(root: str) -> int:
    try:
        import resource
    except ImportError:  # not a system that has such limits
        return sys.maxsize
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    taken = _lines_of(os.path.join(root, "proc/self/statm"))  # in pages, the first number (man 5 proc)
    if limit == resource.RLIM_INFINITY or not taken:
        return sys.maxsize
    return max(limit - int(taken[0].split()[0]) * resource.getpagesize(), 0)


def _meminfo(root: str) -> dict[str, int]:
    """In bytes; the file counts KiB."""
    lines = [line.replace(":", " ").split() for line in _lines_of(os.path.join(root, "proc/meminfo"))]
    return {fields[0]: int(fields[1]) << 10 for fields in lines if len(fields) > 1}


def _counts_in(path: str) -> dict[str, int]:
    pairs = [line.split() for line in _lines_of(path)]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


def _number_in(path: str, otherwise: int) -> int:
    """``otherwise`` where there is no such file, or no number in it: "max" where there is no limit."""
    try:
        return int("".join(_lines_of(path)))
    except ValueError:
        return otherwise


def _lines_of(path: str) -> list[str]:
    """None where the file is missing or cannot be read: on another system, or in a closed container."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError:
        return []
