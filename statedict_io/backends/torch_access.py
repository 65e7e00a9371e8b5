"""What the module ``_core`` asks of the installed torch where no ``_torch`` module was built for its release.

``_core`` never imports torch: it is handed this module and reads these names once.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

Tensor = torch.Tensor
UntypedStorage = torch.UntypedStorage
frombuffer = torch.frombuffer
uint8 = torch.uint8


def _bits(*names: str) -> int:
    bits = 0
    for name in names:
        bits |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return bits


try:
    #: By which LibTorch chooses how a tensor is handled. None: plain tensors are reduced by torch itself.
    dispatch_keys: Any = torch._C._dispatch_keys
    raw_repr: Any = torch._C.DispatchKeySet.raw_repr  # of those keys: the bits
    #: Of a tensor that is strided and dense, on a device with storages, without lazy conjugation or negation, and that
    #: is no wrapper: what torch reduces to ``_rebuild_tensor_v2``.
    PLAIN_KEYS = _bits("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "ADInplaceOrView")
    #: Of one that is not in host memory.
    DEVICE_KEYS = _bits("CUDA") & ~_bits("CPU")
except (AttributeError, TypeError):  # a torch that shows them no more, or in another way
    dispatch_keys, raw_repr, PLAIN_KEYS, DEVICE_KEYS = None, None, 0, 0


def no_bytes() -> torch.UntypedStorage:
    """A CPU storage of 0 bytes that cannot be resized, as those over memory."""
    return torch.UntypedStorage(0, device="cpu")[0:0]


def device_copies() -> Any:
    """The module that copies storages on devices; few processes need it."""
    return importlib.import_module(f"{__package__}.device_copies")
