"""A fast, safe drop-in for ``torch.save``: the same bytes, written in parallel, checksummed, atomic and durable."""

try:
    import torch as _torch  # noqa: F401
except ImportError as e:
    raise ImportError("statedict_io needs PyTorch 2.6 or later, which this environment lacks: pip install torch") from e

from .backends import BackendInfo, backend_info
from .checkpoint import Checkpoint, TensorInfo, open_checkpoint
from .errors import CorruptCheckpointError, NativeUnavailableError, StateDictIOError
from .loading import load
from .saving import fastsave, save
from .verification import RecordReport, VerifyReport, verify

__all__ = [
    "BackendInfo",
    "Checkpoint",
    "CorruptCheckpointError",
    "NativeUnavailableError",
    "RecordReport",
    "StateDictIOError",
    "TensorInfo",
    "VerifyReport",
    "backend_info",
    "fastsave",
    "load",
    "open_checkpoint",
    "save",
    "verify",
]
