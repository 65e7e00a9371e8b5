"""Chooses what writes an archive; the only place that does."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import NativeUnavailableError
from ..proofs import Verdict
from . import fallback, formats, native
from .protocol import Backend


@dataclass(frozen=True)
class BackendInfo:
    """Which backend ``backend="auto"`` uses, and why."""

    name: str  #: "native" or "torch"
    reason: str  #: in words; where the extension is not used, with the cure
    built_for_torch: str | None  #: version that the extension was built for; None where there is no extension
    torch: str  #: version found
    simd: str | None  #: the CRC-32 implementation in use; None without the extension


def backend_info() -> BackendInfo:
    """Tells which backend is active and why. Never raises."""
    extension, reason, built_for = native.load()
    simd = extension.simd() if extension is not None else None
    chosen = native.name if extension is not None else fallback.name
    if chosen == native.name and not (verdict := formats.reproduced_by(native)):
        chosen, reason = fallback.name, _not_reproduced(verdict)
    elif chosen == fallback.name and not (verdict := formats.reproduced_by(fallback)):
        reason = f"{reason}; {_not_reproduced(verdict)}"
    return BackendInfo(chosen, reason, built_for, torch.__version__, simd)


def choose(wish: str) -> Backend | None:
    """The backend for ``wish``; None where torch has to save by itself because neither backend reproduces its format.

    Raises:
        NativeUnavailableError: ``wish`` is "native" and it cannot be used.
        ValueError: ``wish`` is none of "auto", "native", "torch".
    """
    _check(wish)
    if wish != "torch":
        extension, reason, _ = native.load()
        if extension is not None:
            verdict = formats.reproduced_by(native)
            if verdict:
                return native
            reason = _not_reproduced(verdict)
        if wish == "native":
            raise NativeUnavailableError(f"backend='native': {reason}")
    return fallback if formats.reproduced_by(fallback) else None


def for_reading(wish: str) -> Backend:
    """The backend that reads for ``wish``; what the installed torch writes does not matter here.

    Raises:
        NativeUnavailableError: ``wish`` is "native" and it cannot be used.
        ValueError: ``wish`` is none of "auto", "native", "torch".
    """
    _check(wish)
    if wish != "torch":
        extension, reason, _ = native.load()
        if extension is not None:
            return native
        if wish == "native":
            raise NativeUnavailableError(f"backend='native': {reason}")
    return fallback


def _check(wish: str) -> None:
    if wish not in ("auto", "native", "torch"):
        raise ValueError(f"backend must be 'auto', 'native' or 'torch', got {wish!r}")


def release_buffers() -> None:
    """Gives the memory that is kept for the next save back to the system; that of saves in flight stays."""
    for backend in (native, fallback):
        backend.release_buffers()
    # Pinned memory goes to torch's allocator, which keeps it too. Not of other devices: one that has no such allocator
    # crashes the process.
    empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)
    if empty_host_cache is not None and (torch.cuda.is_initialized() or torch.xpu.is_initialized()):
        empty_host_cache()


def snapshot_memory_nbytes() -> int:
    """Host memory that snapshots of asynchronous saves take, and that is kept for the next."""
    return sum(backend.snapshot_memory_nbytes() for backend in (native, fallback))


def _not_reproduced(verdict: Verdict) -> str:
    if verdict.shortage is not None:
        return f"whether it writes torch's format could not be tried out now ({verdict.shortage}); torch.save is used"
    return f"torch {torch.__version__} writes a format that statedict_io does not reproduce; its own torch.save is used"
