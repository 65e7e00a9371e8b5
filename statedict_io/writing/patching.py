"""``patch_torch``: ``torch.save`` through ``save``, for code that cannot be changed.

A wrapper stands at the names of ``torch.save`` while any patch is active, and saves with the options of the last one;
without one it passes calls on to what it was bound over. So it does no harm where it must stay, because somebody else
has bound a function of his own over it.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.serialization

from .. import backends
from .. import progress as progress_module
from ..options import check_flags
from ..progress import Progress
from ..system.processes import in_forked_child
from . import saving
from .in_flight import Call

_MODULES = (torch, torch.serialization)  # whose name ``save`` is

_Save = Callable[..., None]


class _Binding(NamedTuple):
    module: Any
    found: _Save
    wrapper: _Save
    num_patches: int  # that were active before; when there are no more than these, ``found`` is put back


_lock = threading.RLock()  # a signal handler may save, too
_patches: list[Patch] = []  # that are active, in the order in which they were made
_bindings: list[_Binding] = []


def patch_torch(
    *, durable: bool = True, backend: str = "auto", progress: Progress = None, atomic: bool = True
) -> Patch:
    """Routes ``torch.save`` through :func:`~statedict_io.save`, in every thread, until it is undone.

    At once, as a function; the result undoes it, by :meth:`Patch.undo` or as a context manager. ``torch.save`` and
    ``torch.serialization.save`` are rebound; code that imported either by name before the call keeps the original.
    Patches nest, and the options of the last one that is not undone apply.

    What is not taken goes to what was there before: arguments that ``save`` does not know, the legacy format into a
    file object, and calls in code that ``torch.compile`` traces.

    Args:
        durable, backend, progress: as for :func:`~statedict_io.save`.
        atomic: ``True`` replaces files, and where a file can be written but not replaced writes it in place, with a
            :class:`RuntimeWarning`. A place that has refused a rename is remembered: only the first save into it writes
            everything twice. ``False`` writes in place everywhere, as ``torch.save`` does.

    Raises:
        NativeUnavailableError: ``backend="native"`` and the extension cannot be used.
        TypeError: an option is of a wrong type; names it.
    """
    check_flags(durable=durable, atomic=atomic)
    progress_module.check(progress)
    backends.choose(backend)
    return Patch(durable, backend, progress, atomic)


class Patch:
    """What :func:`patch_torch` did; may be undone from any thread."""

    def __init__(self, durable: bool, backend: str, progress: Progress, atomic: bool) -> None:
        self._durable = durable
        self._backend = backend
        self._progress = progress
        self._atomic = None if atomic else False
        with _lock:
            _bind()
            _patches.append(self)

    @property
    def active(self) -> bool:
        """False once it is undone."""
        return self in _patches

    def undo(self) -> None:
        """Puts back what was there before, unless others have bound something else over it meanwhile: that stays, and
        what it calls passes calls on. Again: does nothing."""
        with _lock:
            if self.active:
                _patches.remove(self)
                _unbind()

    def __enter__(self) -> Patch:
        if not self.active:
            raise RuntimeError("this patch of torch.save has been undone; call patch_torch() again")
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<patch of torch.save: {'active' if self.active else 'undone'}>"

    def _save(self, original: _Save, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            call = _SIGNATURE.bind(*args, **kwargs)
        except TypeError:
            return original(*args, **kwargs)
        call.apply_defaults()
        if not call.arguments["_use_new_zipfile_serialization"] and not _is_path(call.arguments["f"]):
            return original(*args, **kwargs)
        with Call():
            planned = saving.plan(*call.args, backend=self._backend, progress=self._progress)
            refusal = saving.write_planned(planned, durable=self._durable, progress=self._progress, atomic=self._atomic)
        if refusal is not None:
            warnings.warn(
                f"{refusal.filename!r} cannot be replaced ({refusal.strerror}): it was written in place, which is not "
                "atomic",
                RuntimeWarning,
                stacklevel=3,
            )
        return None


def _is_path(f: object) -> bool:
    return isinstance(f, (str, os.PathLike))


def _bind() -> None:
    """Has a wrapper at both names. They share one, as they share a function in torch."""
    ours = {id(binding.wrapper) for binding in _bindings}
    made: dict[int, _Save] = {}
    for module in _MODULES:
        found = module.save
        if id(found) not in ours:
            module.save = made.setdefault(id(found), _wrapper(found))
            _bindings.append(_Binding(module, found, module.save, len(_patches)))


def _unbind() -> None:
    for binding in reversed(_bindings[:]):
        if len(_patches) <= binding.num_patches and binding.module.save is binding.wrapper:
            binding.module.save = binding.found
            _bindings.remove(binding)


def _wrapper(found: _Save) -> _Save:
    @functools.wraps(found)
    def save(*args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling():  # which leaves the original alone, but would trace what is below
            return found(*args, **kwargs)
        last = _patches[-1:]
        return last[0]._save(found, args, kwargs) if last else found(*args, **kwargs)

    return save


def _torch_save_signature() -> inspect.Signature:
    """Of ``save`` what ``torch.save`` takes too: all but the options."""
    signature = inspect.signature(saving.save)
    parameters = [each for each in signature.parameters.values() if each.kind is not each.KEYWORD_ONLY]
    return signature.replace(parameters=parameters)


_SIGNATURE = _torch_save_signature()


def _start_anew() -> None:
    """In a forked child: the lock may be held by a thread that is not there."""
    global _lock
    _lock = threading.RLock()


in_forked_child(_start_anew)
