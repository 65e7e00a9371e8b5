"""``patch_torch``: ``torch.save`` through ``save``, for code that cannot be changed.

Each patch binds a wrapper of its own over what it finds at the names of ``torch.save``, and remembers that. Patches can
be undone in any order, from any thread: a wrapper that something else still refers to then only passes calls on.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.serialization

from .. import backends
from .. import progress as progress_module
from ..progress import Progress
from ..system.processes import in_forked_child
from . import pending, saving

_MODULES = (torch, torch.serialization)  # whose name ``save`` is

_Save = Callable[..., None]
_lock = threading.RLock()  # a signal handler may save, too
_patch_of: weakref.WeakKeyDictionary[Any, Patch] = weakref.WeakKeyDictionary()  # by wrapper


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
    """
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
        self.active = True  #: False once it is undone
        # One wrapper where both names have one function, as they have in torch.
        wrappers: dict[int, _Save] = {}
        with _lock:
            for module in _MODULES:
                original = _without_undone(module.save)
                if id(original) not in wrappers:
                    wrappers[id(original)] = _wrapper(self, original)
                module.save = wrappers[id(original)]

    def undo(self) -> None:
        """Puts back what was there before, unless others have bound something else over it meanwhile: that stays, and
        what it calls passes calls on. Again: does nothing."""
        with _lock:
            self.active = False
            _drop_undone()

    def __enter__(self) -> Patch:
        if not self.active:
            raise RuntimeError("this patch of torch.save has been undone; call patch_torch() again")
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<patch of torch.save: {'active' if self.active else 'undone'}>"

    def _save(self, original: _Save, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.active:
            with _lock:
                _drop_undone()  # somebody who had bound over this patch may have put it back
            return original(*args, **kwargs)
        try:
            call = _SIGNATURE.bind(*args, **kwargs)
        except TypeError:
            return original(*args, **kwargs)
        call.apply_defaults()
        if not call.arguments["_use_new_zipfile_serialization"] and not _is_path(call.arguments["f"]):
            return original(*args, **kwargs)
        with pending.Call():
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


def _wrapper(patch: Patch, original: _Save) -> Any:
    @functools.wraps(original)
    def save(*args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling():  # which leaves the original alone, but would trace what is below
            return save.__wrapped__(*args, **kwargs)
        return patch._save(save.__wrapped__, args, kwargs)

    _patch_of[save] = patch
    return save


def _without_undone(function: Any) -> Any:
    """What is below the wrappers of patches that were undone."""
    while _is_undone(function):
        function = function.__wrapped__
    return function


def _is_undone(function: object) -> bool:
    # Others may have bound objects that have no hash.
    return isinstance(function, types.FunctionType) and function in _patch_of and not _patch_of[function].active


def _drop_undone() -> None:
    """Unbinds the wrappers of patches that were undone, and has none call another."""
    for module in _MODULES:
        module.save = _without_undone(module.save)
    for wrapper in list(_patch_of):
        wrapper.__wrapped__ = _without_undone(wrapper.__wrapped__)


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
