"""What ``load`` raises: errors of the types that ``torch.load`` raises, which name the file and say what is wrong."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator
from typing import Any

from ..errors import CorruptArchiveError, CorruptCheckpointError, FileKindError, LoadedKindError
from ..formats import kinds


@contextlib.contextmanager
def raising_as_torch(f: Any) -> Iterator[None]:
    """For a block that loads ``f``: a path, or an object."""
    try:
        yield
    except CorruptCheckpointError as e:
        raise _as_torch_error(e) from None
    except FileKindError as e:
        raise LoadedKindError(*e.args) from None
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        kind = _foreign_kind(f)
        if kind is None:
            raise
        raise LoadedKindError(f"{os.fsdecode(f)}: {kind}") from None


def _foreign_kind(f: Any) -> kinds.FileKind | None:
    """The kind of a file that torch.load cannot read and does not say why; None for others and for objects."""
    if not isinstance(f, (str, os.PathLike)) or os.fsdecode(f).endswith(".safetensors"):
        return None
    try:
        with open(f, "rb") as file:
            kind = kinds.of_start(file.read(kinds.START_NBYTES), os.fsdecode(f))
    except OSError:
        return None
    return None if kind in _TORCH_EXPLAINS else kind


# torch.load reads the first two, refuses some of what is in them, and says so.
_TORCH_EXPLAINS = (kinds.LEGACY, kinds.TAR, kinds.UNKNOWN)


def _as_torch_error(error: CorruptCheckpointError) -> CorruptArchiveError:
    described = CorruptArchiveError(*error.args)
    described.records = error.records
    return described
