"""The ``.metadata`` of a checkpoint directory, read without running what is in it."""

from __future__ import annotations

import enum
import functools
import importlib
import math
import ntpath
import os
import pathlib
import pickle
import posixpath
from collections.abc import Iterator
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from ..errors import StateDictIOError, corrupt
from ..pickles.hash_bounds import check_pickle
from ..pickles.refusals import refusal
from ..pickles.restricted import unpickled

CURE = "pass weights_only=False (on the command line --trust)"


class DirectoryReader(FileSystemReader):  # type: ignore[misc]
    """Stock torch's reader, whose :meth:`read_metadata` unpickles only DCP's own classes.

    Args:
        path: of the directory.
        weights_only: ``False`` unpickles anything, as stock torch does.
    """

    def __init__(self, path: str, *, weights_only: bool) -> None:
        super().__init__(path)
        self._weights_only = weights_only

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """
        Raises:
            OSError: there is none, or it cannot be read.
            pickle.UnpicklingError: it needs a class that is not DCP's; names it.
            CorruptCheckpointError: it is not sound.
        """
        if not self._weights_only:
            return super().read_metadata(*args, **kwargs)
        path = os.path.join(self.path, ".metadata")
        with open(path, "rb") as file:
            metadata = parse(file.read(), path)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def parse(stream: bytes, path: str, *, weights_only: bool = True) -> Metadata:
    """
    Args:
        stream: all of ``.metadata``.
        path: of it, for messages.
        weights_only: ``False`` unpickles anything.

    Raises:
        pickle.UnpicklingError: it needs a class that is not DCP's; names it.
        CorruptCheckpointError: it is not sound.
    """
    try:
        if weights_only:
            check_pickle(stream, path)
            metadata = unpickled(stream, allowed_globals())
        else:
            metadata = pickle.loads(stream)
    except pickle.UnpicklingError as e:
        raise refusal(path, e, CURE) if weights_only else e from None
    except (OSError, MemoryError, StateDictIOError):
        raise
    except Exception as e:  # a damaged or hostile stream leads to any
        raise corrupt(path, f"it cannot be unpickled ({type(e).__name__}: {e})") from None
    try:
        problem = next(_problems(metadata), None)
    except (AttributeError, TypeError, ValueError, OverflowError) as e:
        problem = f"it is no metadata of a checkpoint ({e})"
    if problem is not None:
        raise corrupt(path, problem)
    return metadata


def _problems(metadata: Any) -> Iterator[str]:
    if type(metadata) is not Metadata:
        yield f"it holds a {type(metadata).__name__}, not the metadata of a checkpoint"
    stored = metadata.storage_data
    for index, info in stored.items():
        if not _is_inside(info.relative_path):
            yield f"{index.fqn!r} is said to lie in {info.relative_path!r}, which is not in the directory"
    for name, value in metadata.state_dict_metadata.items():
        if type(name) is not str:
            yield f"a value is named {name!r}"
        if type(value) is not TensorStorageMetadata:
            continue
        for chunk in value.chunks:
            info = stored.get(dcp_metadata.MetadataIndex(name, chunk.offsets))
            if info is None:
                yield f"a part of {name!r} is nowhere"
            nbytes = math.prod(chunk.sizes) * value.properties.dtype.itemsize
            if nbytes > info.length and not getattr(info, "transform_descriptors", None):
                yield f"a part of {name!r} is said to have {nbytes} bytes in {info.length}"


def _is_inside(relative_path: str) -> bool:
    """Whether a path leads below the directory that it starts in, on any system."""
    return all(
        not path.isabs(relative_path)
        and not path.splitdrive(relative_path)[0]
        and os.pardir not in relative_path.replace("\\", "/").split("/")
        for path in (posixpath, ntpath)
    )


@functools.cache
def allowed_globals() -> dict[str, Any]:
    """By full name: what DCP pickles into its metadata, in this torch and in older ones."""
    found: dict[str, Any] = {}
    for module, names in (
        (dcp_metadata, [*dcp_metadata.__all__, "_MEM_FORMAT_ENCODING"]),
        (dcp_filesystem, ["_StorageInfo"]),
        (_module("torch.distributed._shard.sharded_tensor.metadata"), ["TensorProperties", "MEM_FORMAT_ENCODING"]),
    ):
        for name in names:
            if hasattr(module, name):
                found[f"{module.__name__}.{name}"] = getattr(module, name)
    # Where the checkpoint was saved to. It is not looked up, so a path of any system will do.
    for name, kind in (("Posix", pathlib.PurePosixPath), ("Windows", pathlib.PureWindowsPath)):
        for where in ("pathlib", "pathlib._local"):
            found |= {f"{where}.{name}Path": kind, f"{where}.Pure{name}Path": kind}
    # Some Pythons pickle a member of an enumeration as getattr(its class, its name).
    found["builtins.getattr"] = _member
    return found


def _member(kind: Any, name: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise pickle.UnpicklingError("GLOBAL builtins.getattr is refused but for members of enumerations")
    return kind[name]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
