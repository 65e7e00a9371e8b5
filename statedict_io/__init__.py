"""A fast, safe drop-in for ``torch.save``: the same bytes, written in parallel, checksummed, atomic and durable."""

try:
    import torch as _torch  # noqa: F401
except ImportError as e:
    raise ImportError("statedict_io needs PyTorch 2.6 or later, which this environment lacks: pip install torch") from e

import importlib as _importlib
from typing import TYPE_CHECKING, Any

from .backends import release_buffers
from .errors import (
    CheckpointDirectoryInUseError,
    CheckpointDirectoryWarning,
    CorruptCheckpointError,
    FileKindError,
    NativeUnavailableError,
    SlowerWarning,
    SnapshotLimitError,
    StateDictIOError,
)
from .version import VERSION

# What saves into a file is there from the beginning: a signal handler may be the first who needs it, and cannot wait
# for an import that it has interrupted. What reads, patches torch.save, speaks to stores or tells of the backends is
# imported when it is first used, as is the Python backend beside the native one: tests/test_importing.py lists them.
from .writing.async_saving import save_async
from .writing.pending import PendingSave, wait_all
from .writing.saving import fastsave, save

if TYPE_CHECKING:
    from .backends.info import BackendInfo, backend_info
    from .checkpoints.checkpoint_directory import CheckpointDirectory
    from .checkpoints.entry import SavedCheckpoint, SkippedCheckpoint
    from .checkpoints.trainable import trainable_state_dict
    from .reading.lazy.checkpoint import Checkpoint, TensorInfo, open_checkpoint
    from .reading.lazy.differences import Differences, TensorDifference, diff
    from .reading.loading import load
    from .reading.verification import RecordReport, VerifyReport, verify
    from .writing.patching import Patch, patch_torch
    from .writing.safetensors_saving import save_safetensors

__version__ = VERSION

__all__ = [
    "BackendInfo",
    "Checkpoint",
    "CheckpointDirectory",
    "CheckpointDirectoryInUseError",
    "CheckpointDirectoryWarning",
    "CorruptCheckpointError",
    "Differences",
    "FileKindError",
    "NativeUnavailableError",
    "Patch",
    "PendingSave",
    "RecordReport",
    "SavedCheckpoint",
    "SkippedCheckpoint",
    "SlowerWarning",
    "SnapshotLimitError",
    "StateDictIOError",
    "TensorDifference",
    "TensorInfo",
    "VerifyReport",
    "backend_info",
    "diff",
    "fastsave",
    "load",
    "open_checkpoint",
    "patch_torch",
    "release_buffers",
    "save",
    "save_async",
    "save_safetensors",
    "trainable_state_dict",
    "verify",
    "wait_all",
]

# Imported when it is first asked for: name -> module.
_LATER = {
    "BackendInfo": "backends.info",
    "Checkpoint": "reading.lazy.checkpoint",
    "CheckpointDirectory": "checkpoints.checkpoint_directory",
    "Differences": "reading.lazy.differences",
    "Patch": "writing.patching",
    "RecordReport": "reading.verification",
    "SavedCheckpoint": "checkpoints.entry",
    "SkippedCheckpoint": "checkpoints.entry",
    "TensorDifference": "reading.lazy.differences",
    "TensorInfo": "reading.lazy.checkpoint",
    "VerifyReport": "reading.verification",
    "backend_info": "backends.info",
    "diff": "reading.lazy.differences",
    "load": "reading.loading",
    "open_checkpoint": "reading.lazy.checkpoint",
    "patch_torch": "writing.patching",
    "save_safetensors": "writing.safetensors_saving",
    "trainable_state_dict": "checkpoints.trainable",
    "verify": "reading.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(_importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
