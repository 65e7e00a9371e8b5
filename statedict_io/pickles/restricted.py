"""torch's restricted unpickler with further globals, for one stream: ``torch.serialization.safe_globals`` would allow
them to whatever other threads load meanwhile."""

from __future__ import annotations

import io
import types
from collections.abc import Mapping, Set
from typing import Any

import torch

from ..errors import StateDictIOError
from .protocol_2 import in_protocol_2


class _Allowed(dict[str, Any]):
    """Full name -> global. The unpickler asks for each call whether its function is among the values."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        super().__init__(names)
        self._values = frozenset(names.values())

    def values(self) -> Set[Any]:  # type: ignore[override]
        return self._values


def unpickled(stream: bytes, allowed: Mapping[str, Any]) -> Any:
    """What is in a pickle of any protocol from 2 on.

    Args:
        allowed: full name ("module.name") -> what to take for it, besides what torch and the user allow. The values
            have to be hashable.

    Raises:
        pickle.UnpicklingError: it needs something that is not allowed, or an opcode that torch's unpickler lacks.
        StateDictIOError: the installed torch's unpickler has another shape.
        Exception: any, for a stream that is damaged.
    """
    module = torch._weights_only_unpickler
    load = module.Unpickler.load
    if not {"_get_allowed_globals", "_get_user_allowed_globals"} <= set(load.__code__.co_names):
        raise StateDictIOError(
            f"the restricted unpickler of torch {torch.__version__} cannot be told what to allow; pass "
            "weights_only=False if you trust the file"
        )
    # The user's come last, as what the user says goes; torch's own cannot be replaced.
    names = _Allowed({**allowed, **module._get_user_allowed_globals(), **module._get_allowed_globals()})
    others = {**vars(module), "_get_allowed_globals": lambda: names, "_get_user_allowed_globals": dict}
    rebound = types.FunctionType(load.__code__, others, load.__name__)
    return rebound(module.Unpickler(io.BytesIO(in_protocol_2(stream)), encoding="utf-8"))
