"""Names of temporaries, which say whose they are.

``.<target's name, cut>.<its CRC-32>.<owner>.<serial>-<nonce>.sdio-tmp``. Names that share the first two fields at worst
clean up after each other. An owner is a process of one boot of one machine:
``<host>-<boot>-<pid namespace>-<pid>-<start time>``.

torch names an archive after the file that it opens, less its last suffix. A temporary that torch is to open is
``<archive's name>.<owner>_<serial>-<nonce>_sdio-tmp``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
import socket
import time
import zlib

from ..system import machine
from ..system.directories import Directory
from ..system.processes import in_forked_child

_SUFFIX = "sdio-tmp"
_READABLE_NBYTES = 60  # of the target's name, so that a leftover tells what it was to become
_MAX_ARCHIVE_NAME_NBYTES = 160  # with owner and suffix still a name that file systems take
_FOREIGN_LEFTOVER_SECONDS = 24 * 3600
_serial = itertools.count()


@functools.lru_cache(maxsize=64)  # many saves go to one path
def prefix_of(name: str) -> str:
    """With which the names of all temporaries of a target of that name begin."""
    readable = name[:_READABLE_NBYTES]
    while not readable.isascii() and len(os.fsencode(readable)) > _READABLE_NBYTES:
        readable = readable[:-1]  # by characters: some file systems refuse half of one
    encoded = name.encode() if name.isascii() else os.fsencode(name)
    return f".{readable}.{zlib.crc32(encoded):08x}."


def new_name(name: str, *, for_torch: str | None = None) -> str:
    """Of a temporary of the target ``name``.

    Args:
        for_torch: an archive's name, after which torch is to name the archive when it opens the temporary. If it is
            too long for that, it is not heeded.
    """
    pid = os.getpid()
    if for_torch is not None and len(os.fsencode(for_torch)) <= _MAX_ARCHIVE_NAME_NBYTES:
        return f"{for_torch}.{owner(pid)}_{next(_serial):x}-{_nonce(pid)}_{_SUFFIX}"
    return f"{prefix_of(name)}{owner(pid)}.{next(_serial):x}-{_nonce(pid)}.{_SUFFIX}"


@functools.cache
def _machine() -> str:
    """Host and boot, so that a process id means something."""
    host = socket.gethostname() + machine.machine_id()
    parts = (host, machine.boot_id())
    return "-".join(hashlib.blake2b(part.encode(), digest_size=4).hexdigest() for part in parts)


@functools.cache
def owner(pid: int) -> str:
    """The process ``pid`` of this machine; a forked child has a name of its own."""
    return f"{_machine()}-{machine.pid_namespace():x}-{pid:x}-{machine.start_time(pid) or 0:x}"


@functools.cache
def _nonce(pid: int) -> str:
    """For processes that cannot tell themselves apart, where /proc is hidden."""
    del pid
    return os.urandom(4).hex()


in_forked_child(owner.cache_clear)  # a descendant can get the id of an ancestor that is gone
in_forked_child(_nonce.cache_clear)


def remove_leftovers(directory: Directory, name: str, archive_name: str) -> None:
    """Removes this target's temporaries whose owner is gone. Never an error: they are in nobody's way."""
    prefixes = prefix_of(name), f"{archive_name}."
    try:
        entries = directory.names()
    except OSError:
        return
    for entry in entries:
        if entry.endswith(_SUFFIX) and entry.startswith(prefixes):
            owner_and_serial = entry.removeprefix(prefixes[0]).removeprefix(prefixes[1])
            with contextlib.suppress(OSError):
                if _is_abandoned(owner_and_serial, entry, directory):
                    directory.remove(entry)


def _is_abandoned(owner_and_serial: str, entry: str, directory: Directory) -> bool:
    try:
        host, boot, namespace, pid, start = re.split("[._]", owner_and_serial)[0].split("-")
        process, started = int(pid, 16), int(start, 16)
    except ValueError:  # not a name of ours
        return False
    our_host, our_boot, our_namespace, *_ = owner(os.getpid()).split("-")
    if (host, boot, namespace) == (our_host, our_boot, our_namespace) and machine.boot_id():
        runs = machine.runs(process, started)
        if runs is not None:
            return not runs
    # A machine or container whose processes cannot be seen from here, or another one that has this one's name. A save
    # that lives changes its temporary all the time.
    found = directory.look_at(entry)
    if found is None:
        return False
    age = time.time() - found.st_mtime
    # This machine, before it was booted; if it is another of the same name, its temporary is younger than our boot.
    from_before_boot = host == our_host and boot != our_boot and age > machine.seconds_since_boot()
    return from_before_boot or age > _FOREIGN_LEFTOVER_SECONDS
