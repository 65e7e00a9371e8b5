"""Chooses what writes and what reads an archive; the only place that does."""

from __future__ import annotations

import functools
import sys
from types import ModuleType

import torch

from .. import options
from ..errors import NativeUnavailableError
from ..installed import proofs
from ..installed.proofs import Verdict
from . import extension, installation, reproduction, slower
from .native import NativeBackend
from .protocol import Backend

NATIVE = NativeBackend.name
PYTHON = "python"  #: the name of the backend that needs nothing compiled
_OLD_NAME = "torch"  # of that one, still taken
_WISHES = ("auto", NATIVE, PYTHON)


def choose(wish: str) -> Backend | None:
    """The backend for ``wish``; None where torch has to save by itself because neither backend reproduces its format.

    Raises:
        NativeUnavailableError: ``wish`` is "native" and it cannot be used.
        ValueError: ``wish`` is none of "auto", "native", "python" and "torch", which is another word for "python".
    """
    if _wants_compiled(wish):
        reason = extension.find().core_info.reason
        if (native := native_backend()) is not None:
            verdict = reproduction.reproduced_by(native)
            if verdict:
                return native
            reason = not_reproduced(verdict)
        if wish == NATIVE:
            raise NativeUnavailableError(f"backend='native': {reason}")
    python = python_backend()
    return python if reproduction.reproduced_by(python) else None


def for_reading(wish: str) -> Backend:
    """The backend that reads for ``wish``; what the installed torch writes does not matter here."""
    return usable(wish)


def usable(wish: str) -> Backend:
    """The backend for ``wish`` where the installed torch's format does not matter: for other formats, and for reading.

    Raises:
        NativeUnavailableError: ``wish`` is "native" and it cannot be used.
        ValueError: as :func:`choose`.
    """
    if _wants_compiled(wish):
        if (native := native_backend()) is not None:
            return native
        if wish == NATIVE:
            raise NativeUnavailableError(f"backend='native': {extension.find().core_info.reason}")
    return python_backend()


def python_backend() -> Backend:
    """The one that needs nothing compiled."""
    from . import python

    return python.BACKEND


def native_backend() -> NativeBackend | None:
    """The compiled one, where it is in use."""
    core = extension.find().core
    return None if core is None else _native_backend(core)


@functools.cache
def _native_backend(core: ModuleType) -> NativeBackend:
    """Always the same one: what is proved of it is proved once."""
    return NativeBackend(core)


def _wants_compiled(wish: str) -> bool:
    if wish != _OLD_NAME:
        options.check_choice("backend", wish, _WISHES)
    return wish not in (PYTHON, _OLD_NAME)


def warn_if_saving_is_slow(wish: str, *, reduction: Verdict | None = None) -> None:
    """The one warning of the process, where what saves is not what was installed for. Called before anything is
    written.

    Args:
        wish: as for :func:`choose`.
        reduction: whether compiled code may reduce tensors; None where that was not asked.
    """
    if slower.has_warned() or not _wants_compiled(wish):
        return
    found = extension.find()
    if found.core is None and found.is_installed:
        slower.warn(found.core_info.reason)
    elif not (verdict := reproduction.reproduced_by(native_backend() or python_backend())):
        slower.warn(not_reproduced(verdict))
    elif reduction is not None and not reduction:
        finding = "reduces tensors otherwise than compiled code here does"
        slower.warn(_not_proved(proofs.REDUCTION, reduction, finding, "Python code reduces them"))


def warn_if_reading_is_slow(wish: str, *, loading: Verdict | None = None, device: torch.device | None = None) -> None:
    """The same for what reads.

    Args:
        wish: as for :func:`for_reading`.
        loading: whether torch's loading works with our reader; None where that was not asked.
        device: that all of it is read onto; None if there is none.
    """
    warn_if_not_compiled(wish)
    if slower.has_warned() or not _wants_compiled(wish):
        return
    found = extension.find()
    if loading is not None and not loading:
        finding = "does not load through the reader of statedict_io"
        slower.warn(_not_proved(proofs.LOADING, loading, finding, "torch reads by itself"))
    elif device is not None and found.core is not None and not found.torch_info:
        slower.warn(found.torch_info.reason)


def warn_if_not_compiled(wish: str) -> None:
    """The same where the extension is installed and cannot be used."""
    if slower.has_warned() or not _wants_compiled(wish):
        return
    found = extension.find()
    if found.core is None and found.is_installed:
        slower.warn(found.core_info.reason)


def release_buffers() -> None:
    """Gives the memory that is kept for the next save back to the system; that of saves in flight stays."""
    for backend in _imported():
        backend.release_buffers()
    # Pinned memory goes to torch's allocator, which keeps it too. Not of other devices: one that has no such allocator
    # crashes the process.
    empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)
    if empty_host_cache is not None and (torch.cuda.is_initialized() or torch.xpu.is_initialized()):
        empty_host_cache()


def snapshot_memory_nbytes() -> int:
    """Host memory that snapshots of asynchronous saves take, and that is kept for the next."""
    return sum(backend.snapshot_memory_nbytes() for backend in _imported())


def _imported() -> list[Backend]:
    """The backends that this process may have used."""
    python = python_backend() if f"{__name__}.python" in sys.modules else None
    return [backend for backend in (native_backend(), python) if backend is not None]


def not_reproduced(verdict: Verdict) -> str:
    """What it means that the proof of the format does not hold."""
    finding = "writes a format that statedict_io does not reproduce"
    return _not_proved(proofs.FORMAT, verdict, finding, "the Python backend or torch.save saves instead")


def _not_proved(name: str, verdict: Verdict, finding: str, consequence: str) -> str:
    if verdict.shortage is not None:
        return f"the proof {name!r} could not be tried out now ({verdict.shortage}), so {consequence}"
    return (
        f"torch {torch.__version__} {finding} (the proof {name!r} failed: {verdict.problem}), so {consequence}; "
        f"{installation.cure(newer=True)}"
    )
