"""A fast, safe drop-in for ``torch.save``: the same bytes, written in parallel, checksummed, atomic and durable."""

try:
    import torch as _torch  # noqa: F401
except ImportError as e:
    raise ImportError("statedict_io needs PyTorch 2.6 or later, which this environment lacks: pip install torch") from e

from .async_saving import save_async
from .backends import BackendInfo, backend_info, release_buffers
from .errors import CorruptCheckpointError, NativeUnavailableError, SnapshotLimitError, StateDictIOError
from .pending import PendingSave, wait_all
from .saving import fastsave, save

__all__ = [
    "BackendInfo",
    "CorruptCheckpointError",
    "NativeUnavailableError",
    "PendingSave",
    "SnapshotLimitError",
    "StateDictIOError",
    "backend_info",
    "fastsave",
    "release_buffers",
    "save",
    "save_async",
    "wait_all",
]
