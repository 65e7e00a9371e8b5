"""Host memory for snapshots of the Python backend, kept for the next one: fresh pages cost more than the copies."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Sequence

from ..system.processes import in_forked_child

_HUGE_PAGE_NBYTES = 2 << 20
_PIECE_NBYTES = 8 << 20
_MAX_THREADS = 16

_lock = threading.RLock()  # a signal handler may save, and a snapshot be dropped by the collector
_idle: list[mmap.mmap] = []
_nbytes = 0  # of all arenas, idle or not


def acquire(nbytes: int, max_nbytes: int) -> mmap.mmap:
    """At least ``nbytes`` of memory, which :func:`release` takes back. Idle memory that would make the sum of all
    exceed ``max_nbytes`` goes back to the system."""
    global _nbytes
    nbytes = arena_nbytes(nbytes)
    with _lock:
        # Of this size only: one that is larger would count for less than it takes.
        for arena in [*_idle]:
            if len(arena) == nbytes and arena in _idle:  # a signal handler may have taken it
                _idle.remove(arena)
                return arena
        while _idle and _nbytes + nbytes > max_nbytes:
            _nbytes -= len(_idle.pop(0))
        arena = _map(nbytes)
        _nbytes += nbytes
        return arena


def arena_nbytes(nbytes: int) -> int:
    return max(1, -(-nbytes // _HUGE_PAGE_NBYTES)) * _HUGE_PAGE_NBYTES


def release(arena: mmap.mmap) -> None:
    with _lock:
        _idle.append(arena)


def total_nbytes() -> int:
    """Of all arenas, idle or not."""
    return _nbytes


def release_idle() -> None:
    global _nbytes
    with _lock:
        while _idle:
            _nbytes -= len(_idle.pop())


def copy(pieces: Sequence[tuple[int, int, int]]) -> None:
    """Copies (destination address, source address, nbytes) in several threads, without the GIL."""
    work = [
        (to + offset, source + offset, min(_PIECE_NBYTES, nbytes - offset))
        for to, source, nbytes in pieces
        for offset in range(0, nbytes, _PIECE_NBYTES)
    ]
    remaining = iter(work)

    def copy_some() -> None:
        while True:
            with taking:
                piece = next(remaining, None)
            if piece is None:
                return
            ctypes.memmove(*piece)

    taking = threading.Lock()
    threads = []
    for _ in range(min(os.cpu_count() or 1, _MAX_THREADS, sum(n for _, _, n in work) // _PIECE_NBYTES) - 1):
        thread = threading.Thread(target=copy_some)
        try:
            thread.start()
        except RuntimeError:  # no more threads: this one copies what they do not
            break
        threads.append(thread)
    try:
        copy_some()
    finally:
        for thread in threads:
            thread.join()


def _map(nbytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    try:
        arena = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as e:
        raise MemoryError(f"no {nbytes} bytes of memory for a snapshot: {e}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            arena.madvise(mmap.MADV_HUGEPAGE)
    return arena


def _start_anew() -> None:
    """In a forked child: the lock may be held for ever, and the arenas by threads that are not there."""
    global _lock, _idle, _nbytes
    _lock, _idle, _nbytes = threading.RLock(), [], 0


in_forked_child(_start_anew)
