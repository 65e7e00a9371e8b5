"""What ``load`` raises: errors of the types that ``torch.load`` raises, which name the file and say what is wrong."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
from collections.abc import Iterator

from ..errors import (
    CorruptArchiveError,
    CorruptCheckpointError,
    FileKindError,
    LoadedKindError,
    StateDictIOError,
    UnknownKindError,
    as_raised,
    corrupt,
)
from ..formats import kinds
from .load_steps import ArchiveSteps, LoadRequest
from .opened_again import Replaced

# What torch raises where a file in its legacy format ends too early, but for cuts in the name of a class: what is left
# of that is refused, at the end of the file. Of some errors only the texts tell.
_ENDS = (EOFError, IndexError, struct.error)
_END_TEXTS = ("truncated", "unexpected EOF", "Ran out of input")


@contextlib.contextmanager
def raising_as_torch(steps: ArchiveSteps, *, pickled_by_default: bool) -> Iterator[None]:
    """For a block in which torch loads.

    ``pickled_by_default``: not by a module that the user has chosen, which may write its files in a format of its own.
    """
    try:
        yield
    except CorruptCheckpointError as e:
        raise _as_torch_error(e) from None
    except FileKindError as e:
        raise LoadedKindError(*e.args) from None
    except (StateDictIOError, Replaced, OSError, MemoryError):
        raise
    except Exception as e:
        better = _better(e, steps, pickled_by_default)
        if better is None:
            raise
        raise better from None


@contextlib.contextmanager
def naming_as_torch() -> Iterator[None]:
    """For a block that loads without torch: errors are those that ``torch.load`` raises for such files too."""
    try:
        yield
    except CorruptCheckpointError as e:
        raise e if isinstance(e, RuntimeError) else _as_torch_error(e) from None


def _better(error: Exception, steps: ArchiveSteps, pickled_by_default: bool) -> Exception | None:
    """The error that says of a file that torch cannot read what it is; None where torch's own does."""
    start = _start(steps.request)
    if start is None or start.startswith(kinds.ZIP_START):
        return None
    path = os.fsdecode(steps.request.name)
    kind = kinds.of_start(start, path)
    if kind is None:
        return _damaged(error, path, kinds.damaged_start(start))
    if kind is kinds.LEGACY:
        if _tells_of_end(error) or (steps.stopped_at_end and isinstance(error, pickle.UnpicklingError)):
            return _damaged(error, path, "the file, in torch's legacy format, ends too early")
        return None
    if kind is kinds.TAR or (kind is kinds.UNKNOWN and not pickled_by_default):
        return None  # torch may read it, and has refused what is in it
    base = UnknownKindError if kind is kinds.UNKNOWN else LoadedKindError
    return as_raised(base, type(error), f"{path}: {kinds.described(kind, start)}")


def _tells_of_end(error: Exception) -> bool:
    return isinstance(error, _ENDS) or any(text in str(error) for text in _END_TEXTS)


def _damaged(error: Exception, path: str, problem: str) -> Exception:
    return as_raised(CorruptArchiveError, type(error), str(corrupt(path, problem)))


def _start(request: LoadRequest) -> bytes | None:
    """The first bytes of the file; None of an object that the caller gave, which is his to look at."""
    try:
        if request.source is not None:
            request.f.seek(0)
            return bytes(request.f.read(kinds.START_NBYTES))
        if not request.is_path or os.fsdecode(request.f).endswith(".safetensors"):
            return None
        with open(request.f, "rb") as file:
            return file.read(kinds.START_NBYTES)
    except OSError:
        return None


def _as_torch_error(error: CorruptCheckpointError) -> CorruptArchiveError:
    described = CorruptArchiveError(*error.args)
    described.records = error.records
    return described
