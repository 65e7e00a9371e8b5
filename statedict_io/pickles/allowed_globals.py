"""Whether a stream for torch's restricted unpickler needs what its user has allowed it, which may be any code."""

from __future__ import annotations

import _compat_pickle
from typing import Any

import torch


def may_call_others(stream: bytes) -> bool:
    """Whether unpickling ``stream`` may call a class or function that is neither torch's nor a built-in exception,
    which torch allows itself from 2.14 on. Answers by looking for their names, so now and then also where one of those
    is only spelled in it."""
    allowed = getattr(torch._weights_only_unpickler, "_get_user_allowed_globals", None)
    if allowed is None:
        return True
    return any(
        name in stream
        for full_name, value in allowed().items()
        if not _keeps_what_it_is_given(full_name, value)
        for name in _as_written(full_name)
    )


def _keeps_what_it_is_given(full_name: str, value: Any) -> bool:
    module = getattr(value, "__module__", None)
    if module == "builtins":
        return isinstance(value, type) and issubclass(value, BaseException)
    return full_name.startswith("torch.") and isinstance(module, str) and module.startswith("torch.")


def _as_written(full_name: str) -> set[bytes]:
    """The last part of a global's name as an instruction of protocol 2 ends with it, which has names of Python 2 for
    some."""
    renamed: dict[tuple[str, str], tuple[str, str]] = getattr(torch._utils, "NAME_MAPPING", _compat_pickle.NAME_MAPPING)
    written = [full_name, *(".".join(old) for old, new in renamed.items() if ".".join(new) == full_name)]
    return {name.rpartition(".")[2].encode("utf-8", "surrogatepass") + b"\n" for name in written}
