"""A fast, safe drop-in for ``torch.save``: the same bytes, written in parallel, checksummed, atomic and durable."""

try:
    import torch as _torch  # noqa: F401
except ImportError as e:
    raise ImportError("statedict_io needs PyTorch 2.6 or later, which this environment lacks: pip install torch") from e

from .async_saving import save_async
from .backends import BackendInfo, backend_info, release_buffers
from .checkpoint import Checkpoint, TensorInfo, open_checkpoint
from .errors import CorruptCheckpointError, FileKindError, NativeUnavailableError, SnapshotLimitError, StateDictIOError
from .loading import load
from .patching import Patch, patch_torch
from .pending import PendingSave, wait_all
from .saving import fastsave, save
from .verification import RecordReport, VerifyReport, verify
from .version import VERSION

__version__ = VERSION

__all__ = [
    "BackendInfo",
    "Checkpoint",
    "CorruptCheckpointError",
    "FileKindError",
    "NativeUnavailableError",
    "Patch",
    "PendingSave",
    "RecordReport",
    "SnapshotLimitError",
    "StateDictIOError",
    "TensorInfo",
    "VerifyReport",
    "backend_info",
    "fastsave",
    "load",
    "open_checkpoint",
    "patch_torch",
    "release_buffers",
    "save",
    "save_async",
    "verify",
    "wait_all",
]
