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
from typing import Any, Literal, TypeVar

_SHORTAGES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOSPC)

T = TypeVar("T")

#: the proofs of this package, by the names under which :func:`~statedict_io.backend_info` reports them
FORMAT = "format"
REDUCTION = "reduction"
LOADING = "loading"
DCP_STRUCTURE = "dcp structure"
NAMES = (FORMAT, REDUCTION, LOADING, DCP_STRUCTURE)


@dataclass(frozen=True)
class Verdict:
    """True where the proof holds."""

    holds: bool
    shortage: str | None = None  #: what the trial failed for want of; None where it said something of torch
    problem: str = ""  #: what went otherwise than expected, in words; empty where the proof holds or lacked something

    def __bool__(self) -> bool:
        return self.holds


@dataclass(frozen=True)
class ProofReport:
    """What has become of one proof in this process."""

    status: Literal["holds", "failed", "not tried yet", "could not be tried"]
    reason: str = ""  #: why it failed or could not be tried; empty otherwise

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status


class Proof:
    """A trial with its verdicts, one for each set of arguments."""

    def __init__(self, name: str, trial: Callable[..., bool]) -> None:
        self._trial = trial
        self._verdicts: dict[tuple[Any, ...], Verdict] = {}  # final, but for those that lacked something
        functools.update_wrapper(self, trial)
        _proofs[name] = self

    def __call__(self, *args: Any) -> Verdict:
        """The verdict for ``args``; tried out where there is none yet."""
        verdict = self._verdicts.get(args)
        if verdict is None or verdict.shortage is not None:
            verdict = self._try_out(args)
            self._verdicts.pop(args, None)  # so that the last one is that of the last trial
            self._verdicts[args] = verdict
        return verdict

    def known(self, *args: Any) -> Verdict | None:
        """The verdict for ``args``, without trying anything; None where there is none yet."""
        return self._verdicts.get(args)

    def report(self) -> ProofReport:
        """A verdict that it failed if there is one, else that of the last trial."""
        verdicts = list(self._verdicts.values())
        failed = [verdict.problem for verdict in verdicts if not verdict and verdict.shortage is None]
        if failed:
            return ProofReport("failed", failed[0])
        if not verdicts:
            return ProofReport("not tried yet")
        shortage = verdicts[-1].shortage
        return ProofReport("holds") if shortage is None else ProofReport("could not be tried", shortage)

    def _try_out(self, args: tuple[Any, ...]) -> Verdict:
        try:
            if in_clean_thread(lambda: self._trial(*args)):
                return Verdict(True)
        except Exception as e:  # whatever a future torch changed, its own code knows
            described = f"{type(e).__name__}: {e}"
            return Verdict(False, described) if is_shortage(e) else Verdict(False, problem=described)
        return Verdict(False, problem="a small sample came out otherwise than with torch's own code")


_proofs: dict[str, Proof] = {}


def proof(name: str) -> Callable[[Callable[..., bool]], Proof]:
    """Decorates a function that tries something out and says whether it went as expected; an exception means that it
    did not. Runs where no torch mode, ``skip_data`` or default device of the caller applies.

    Args:
        name: one of :data:`NAMES`.
    """
    assert name in NAMES, name
    return lambda trial: Proof(name, trial)


def reports() -> dict[str, ProofReport]:
    """By name, in the order of :data:`NAMES`. Tries nothing, and imports nothing: who has not been imported has tried
    nothing yet."""
    return {name: _proofs[name].report() if name in _proofs else ProofReport("not tried yet") for name in NAMES}


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
