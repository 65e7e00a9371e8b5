"""Proofs that the installed torch works as this package expects, made by trying it out on a small sample.

The verdict of a proof is kept for the life of the process, unless the trial failed for want of memory, threads or file
descriptors: that says nothing about torch, and the next call tries again.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

_SHORTAGES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOSPC)

T = TypeVar("T")


@dataclass(frozen=True)
class Verdict:
    """True where the proof holds."""

    holds: bool
    shortage: str | None = None  #: what the trial failed for want of; None where it said something of torch

    def __bool__(self) -> bool:
        return self.holds


def proof(trial: Callable[..., bool]) -> Callable[..., Verdict]:
    """Decorates a function that tries something out and says whether it went as expected; an exception means that it
    did not. Runs where no torch mode, ``skip_data`` or default device of the caller applies. Kept by arguments."""
    verdicts: dict[tuple[Any, ...], Verdict] = {}

    @functools.wraps(trial)
    def prove(*args: Any) -> Verdict:
        verdict = verdicts.get(args)
        if verdict is None:
            try:
                verdict = Verdict(in_clean_thread(lambda: trial(*args)))
            except Exception as e:  # whatever a future torch changed, its own code knows
                verdict = Verdict(False, f"{type(e).__name__}: {e}" if is_shortage(e) else None)
            if verdict.shortage is None:
                verdicts[args] = verdict
        return verdict

    return prove


def is_shortage(error: BaseException) -> bool:
    """Whether ``error`` may come from a want of memory, threads or file descriptors."""
    if isinstance(error, OSError):
        return error.errno in _SHORTAGES
    if isinstance(error, ImportError):  # of a shared library, which the loader has only words for
        words = [os.strerror(number) for number in _SHORTAGES] + ["failed to map segment"]
        return any(word.lower() in str(error).lower() for word in words)
    # RuntimeError: of torch's allocator, and of threads that cannot start.
    return isinstance(error, (MemoryError, RuntimeError))


def in_clean_thread(function: Callable[[], T]) -> T:
    """Calls ``function`` where no torch mode, ``skip_data`` or default device of the caller applies: those are per
    thread.

    Raises:
        Exception: what ``function`` raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=call)
    try:
        thread.start()
    except RuntimeError:  # no more threads, or the interpreter is exiting
        return function()
    thread.join()
    try:
        if errors:
            raise errors[0]
    finally:
        errors.clear()  # the error's traceback holds this frame
    return results[0]
