"""Many ranks, one file: a storage for ``torch.distributed.checkpoint``. See docs/distributed.md.

``SingleFileWriter`` writes one file of ``torch.save``'s format from all ranks of a job; ``SingleFileReader`` gives
every rank its part of any such file.
"""

try:
    from torch.distributed.checkpoint import storage as _storage  # noqa: F401
except ImportError as e:
    raise ImportError(
        "statedict_io.dcp needs a PyTorch with distributed support; torch.distributed.is_available() is False in this "
        f"one: {e}"
    ) from e

from .reader import SingleFileReader
from .writer import SingleFileWriter

__all__ = ["SingleFileReader", "SingleFileWriter"]
