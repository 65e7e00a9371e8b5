"""Folders of weights, and indexes of shards: which files are read, and which tensor each has.

As transformers lays them out: ``model.safetensors``, or ``model.safetensors.index.json`` with the files that it names
beside it, or the same of ``pytorch_model.bin``. A directory of ``torch.distributed.checkpoint`` is another kind of such
a folder, with an index of its own. Nothing outside the folder is opened, links that are in it apart: the
cache of huggingface_hub consists of them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import FileKindError, as_raised, corrupt
from ..remote.urls import is_url
from ..untrusted.limits import MAX_INDEX_NBYTES, listed, shown
from .opened_bytes import OpenedBytes

# The first of these that is there is read, as transformers does.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Where none is: the only file of the first of these kinds.
_SUFFIXES = (".safetensors.index.json", ".bin.index.json", ".safetensors", ".bin", ".pt", ".pth")


#: of a checkpoint directory of torch.distributed.checkpoint, which it stands for
DCP_METADATA = ".metadata"


class Shards(NamedTuple):
    """What an index names."""

    path: str  #: of the index
    paths: list[str]  #: of the files, as they are opened
    shard_of: Mapping[str, int]  #: name of a tensor -> index in ``paths``
    metadata: Mapping[str, str]  #: of the index

    def names_in(self, shard: int) -> list[str]:
        return [name for name, its in self.shard_of.items() if its == shard]

    def check(self, shard: int, found: Sequence[str]) -> None:
        """
        Args:
            found: names of all tensors in a shard.

        Raises:
            CorruptCheckpointError: the index says otherwise.
        """
        there = set(found)
        missing = [name for name in self.names_in(shard) if name not in there]
        if missing:
            raise corrupt(
                self.paths[shard], f"it lacks tensors that {self.path} says are in it: {listed(missing, shown)}"
            )
        for name in found:
            its = self.shard_of.get(name)
            if its is None:
                raise corrupt(self.paths[shard], f"it has tensor {shown(name)!r}, which {self.path} does not name")
            if its != shard:
                raise corrupt(
                    self.paths[shard],
                    f"tensor {shown(name)!r} is in it, and in {self.paths[its]} as {self.path} says",
                )


def shards_of(opened: OpenedBytes, path: str) -> Shards | None:
    """What an index names; None where the file is another one in JSON.

    Args:
        opened: the file.
        path: as given.

    Raises:
        CorruptCheckpointError: the index is not sound.
    """
    from ..formats import shard_index

    if opened.nbytes > MAX_INDEX_NBYTES:
        return None
    index = shard_index.parse(opened.read_at(0, opened.nbytes), opened.name)
    if index is None:
        return None
    folder = path[: path.rfind("/") + 1] if is_url(path) else os.path.dirname(path)
    return Shards(opened.name, [_joined(folder, shard) for shard in index.shards], index.shard_of, index.metadata)


def is_folder(path: Any) -> bool:
    """Whether ``path`` is a directory, or a URL that ends like one."""
    if is_url(path):
        return bool(path.endswith("/"))
    return isinstance(path, (str, bytes, os.PathLike)) and os.path.isdir(path)


def weights_in(folder: str) -> str:
    """The path of the file to read for a folder: of the weights, or of their index.

    Raises:
        FileKindError: there is none, or nothing tells which; an IsADirectoryError too.
        OSError: the folder cannot be read.
    """
    names = _listed(folder)
    for name in _NAMES:
        if name in names:
            return _joined(folder, name)
    if DCP_METADATA in names:
        return _joined(folder, DCP_METADATA)
    for suffix in _SUFFIXES:
        found = sorted(name for name in names if name.endswith(suffix))
        if len(found) == 1:
            return _joined(folder, found[0])
        if found:
            raise _refused(folder, f"is a folder of several files of weights: name one of {listed(found)}")
    raise _refused(folder, f"is a folder without weights: it has none of {listed(_NAMES)}")


def _refused(folder: str, problem: str) -> Exception:
    """A FileKindError that is also what the system says of a directory."""
    error = as_raised(FileKindError, IsADirectoryError, f"{folder}: {problem}")
    if isinstance(error, OSError):
        error.errno, error.filename = errno.EISDIR, folder
    return error


def sizes_of(paths: Sequence[str]) -> list[int]:
    """Of files, for progress: 0 where it is not known."""
    sizes = []
    for path in paths:
        try:
            sizes.append(0 if is_url(path) else os.stat(path).st_size)
        except OSError:
            sizes.append(0)
    return sizes


def _joined(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def _listed(folder: str) -> set[str]:
    if not is_url(folder):
        return set(os.listdir(folder))
    from ..remote.stores import locate, naming_errors

    place = locate(folder)
    with naming_errors(place.url):
        place.fs.invalidate_cache(place.path)  # of what was there before
        return {str(path).rstrip("/").rpartition("/")[2] for path in place.fs.ls(place.path, detail=False)}
