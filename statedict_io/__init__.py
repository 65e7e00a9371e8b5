"""A fast, safe drop-in for ``torch.save``: the same bytes, written in parallel, checksummed, atomic and durable."""

from .backends import BackendInfo, backend_info
from .errors import CorruptCheckpointError, NativeUnavailableError, StateDictIOError
from .saving import fastsave, save

__all__ = [
    "BackendInfo",
    "CorruptCheckpointError",
    "NativeUnavailableError",
    "StateDictIOError",
    "backend_info",
    "fastsave",
    "save",
]
