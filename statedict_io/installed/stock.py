"""The installed torch's own ``save`` and ``load``, whatever is bound to their names, and its settings for them.

Whatever has torch write or read calls these: what others bind to the names may call back, as ``torch.load = sio.load``
and :func:`~statedict_io.patch_torch` do. Where the names were bound to something else before this was imported, torch's
functions are looked for behind it, and what is bound there is taken only where they are not found.
"""

import inspect
from typing import Any

import torch
import torch.serialization


def _own(name: str) -> Any:
    bound = [getattr(module, name) for module in (torch.serialization, torch)]
    for function in bound:
        for _ in range(100):  # of wrappers, each of which says what it wraps
            module = getattr(function, "__globals__", {}).get("__name__", "")
            if module == "torch" or module.startswith("torch."):
                return function
            if not hasattr(function, "__wrapped__"):
                break
            function = function.__wrapped__
    return bound[0]


torch_save = _own("save")
torch_load = _own("load")


# Imported here, as torch imports it in the threads of our proofs otherwise. Those would wait for ever where a signal
# handler saves that has interrupted an import: it holds the lock of all imports, and waits for them.
try:
    from torch.utils.serialization import config as _config
except ImportError:
    _config = None


def setting(of: str, name: str, default: Any) -> Any:
    """``torch.utils.serialization.config.<of>.<name>`` as it is now; ``default`` where the release has no such setting:
    2.6 has no such module."""
    return getattr(getattr(_config, of, None), name, default)


def save_is_rebound() -> bool:
    """Whether something that does not call itself a wrapper of torch's own is bound to ``torch.save``, under either of
    its names, as ``torch.save = sio.save`` or a lambda in its place; a patch of ours does call itself one."""
    return any(inspect.unwrap(module.save) is not torch_save for module in (torch, torch.serialization))
