"""Unpickling sparse tensors without data: torch validates those of a load at its end (always with ``weights_only`` from
2.14 on, before where it is told to), which those cannot pass. They are validated when they are made with data."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

_VALIDATE = "_validate_loaded_sparse_tensors"


def without_placeholders(load: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.serialization._load``, but that it leaves out of the validation what has no data.

    The code is torch's, with another ``torch`` to look names up in; no module is patched. Of another shape it is left
    as it is, and what has no data may then be refused.
    """
    if (
        not isinstance(load, types.FunctionType)
        or load.__closure__ is not None
        or not {"torch", "_utils", _VALIDATE} <= set(load.__code__.co_names)
    ):
        return load
    names = {**load.__globals__, "torch": _Torch()}
    rebound = types.FunctionType(load.__code__, names, load.__name__, load.__defaults__)
    rebound.__kwdefaults__ = load.__kwdefaults__

    def load_and_forget(*args: Any, **options: Any) -> Any:
        try:
            return rebound(*args, **options)
        finally:
            forget_placeholders()  # after an error: otherwise whoever loads next would have them validated

    return load_and_forget


def forget_placeholders() -> None:
    """Takes them off torch's list."""
    # The thread's list from 2.15 on, before one for all.
    of_thread = getattr(torch._utils, "_get_sparse_tensors_to_validate", None)
    unvalidated = of_thread() if of_thread else getattr(torch._utils, "_sparse_tensors_to_validate", None)
    if unvalidated:
        unvalidated[:] = [tensor for tensor in unvalidated if not tensor.is_meta]


class _Torch:
    """The module, but for ``_utils``."""

    def __init__(self) -> None:
        self._utils = _Utils()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _Utils:
    """``torch._utils``. Whoever asks for the function that validates calls it next, and its warnings point there."""

    def __getattr__(self, name: str) -> Any:
        if name == _VALIDATE:
            forget_placeholders()
        return getattr(torch._utils, name)
