"""The error tree.

What the operating system reports stays an :class:`OSError` with its ``errno`` and the final path. What ``torch.save``
raises for bad arguments is raised here too.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Iterable, Iterator
from typing import Any, cast


class StateDictIOError(Exception):
    """Base of the errors that are this library's own."""


class CorruptCheckpointError(StateDictIOError):
    """A checkpoint's bytes are not what its checksums or its structure say."""

    records: tuple[str, ...] = ()  #: the records whose checksums do not match, where that is what is wrong


class CorruptArchiveError(CorruptCheckpointError, RuntimeError):
    """What :func:`statedict_io.load` raises: also the :class:`RuntimeError` that ``torch.load`` raises there."""


class FileKindError(StateDictIOError, ValueError):
    """A file of a kind that is not read or written here; names the kind, and what does."""


class UnknownKindError(FileKindError, CorruptCheckpointError):
    """No kind is recognized: it may be a checkpoint whose beginning is damaged."""


class LoadedKindError(FileKindError, RuntimeError, pickle.UnpicklingError):
    """What :func:`statedict_io.load` raises there: also the errors that ``torch.load`` raises for such files."""


def _keep(self: Any, *args: Any) -> None:
    self.args = args  # which an OSError would take for its number and text


@functools.cache
def _also(base: Any, other: Any) -> type[Exception]:
    methods: dict[str, Any] = {
        # Of both, whatever the other one wants to be made with, and shows.
        "__init__": _keep,
        "__str__": lambda self: str(self.args[0]),
        "__reduce__": lambda self: (as_raised, (base, other, self.args[0])),
        "__module__": __name__,
    }
    try:
        return type(base.__name__, (base, other), methods)
    except TypeError:  # not to be derived from together with another
        return cast(type[Exception], base)


def as_raised(base: Any, other: Any, message: str) -> Exception:
    """An error of ours that can be caught wherever one of the type that torch raises there can."""
    kind = base if issubclass(base, other) else _also(base, other)
    return cast(Exception, kind(message))


def corrupt(path: str, problem: str, records: Iterable[str] = ()) -> CorruptCheckpointError:
    """The error for a file whose bytes are wrong; says what to do."""
    error = CorruptCheckpointError(
        f"{path}: {problem}; the file is damaged or incomplete: copy it again from where it came from, or take an "
        "older checkpoint"
    )
    error.records = tuple(records)
    return error


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """What the system reports in the block without saying of which file carries ``path``."""
    try:
        yield
    except OSError as e:
        if e.errno is not None and e.filename is None:
            e.filename = path
        raise


class NativeUnavailableError(StateDictIOError):
    """``backend="native"`` was asked for and the compiled extension cannot be used; says why and what to do."""


class CheckpointDirectoryInUseError(StateDictIOError):
    """Another process, or another object of this one, saves into the directory."""


class CheckpointDirectoryWarning(UserWarning):
    """What a :class:`CheckpointDirectory` could not do, or has found damaged; the run goes on."""


class SlowerWarning(UserWarning):
    """What runs is slower than what was installed for; says what, why and what to do. Once a process, at the first save
    or load that it concerns, and not where a call asks for ``backend="python"`` or nothing compiled is installed."""


class SnapshotLimitError(StateDictIOError):
    """``save_async(when_full="raise")``: as many saves are in flight, or hold as much memory, as the limits allow."""


def _reduce_refusal(self: Any) -> tuple[Any, ...]:
    return refused_target, (OSError(self.errno, self.strerror), self.filename, self.torch_message)


@functools.cache
def _refusal_type(base: Any) -> type[OSError]:
    # The OSError first: its constructor is the one that sets errno.
    methods: dict[str, Any] = {
        "__str__": lambda self: f"{self.filename}: {self.torch_message}",
        "__reduce__": _reduce_refusal,
        "__module__": __name__,
    }
    return type(base.__name__, (base, RuntimeError), methods)


def refused_target(error: OSError, path: str, torch_message: str) -> OSError:
    """The error for a path that the system will not open.

    ``torch.save`` raises a bare :class:`RuntimeError` there. This one is that (with the path before torch's words), and
    also the :class:`OSError` subclass that fits, with ``errno`` and ``filename``.
    """
    base: Any = type(error)
    refusal = _refusal_type(base)(error.errno, error.strerror, path)
    refusal.torch_message = torch_message  # type: ignore[attr-defined]
    return refusal
