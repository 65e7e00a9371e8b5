"""Which of the classes of named tensors reads a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ...errors import FileKindError
from ...formats import kinds
from ...remote.urls import is_url
from ..opened_bytes import OpenedBytes, open_bytes
from ..records import kind_of
from ..weight_folders import is_folder, shards_of, weights_in
from .archive_tensors import ArchiveTensors
from .legacy_tensors import LegacyTensors, TarTensors
from .named_tensors import NamedTensors
from .safetensors_tensors import SafetensorsTensors
from .shards import ShardedTensors


class _Wish(NamedTuple):
    """The arguments of :func:`open_tensors`, and what was found for them."""

    path: str
    backend: str
    weights_only: bool
    close: Callable[[], None]  #: the file


def _open_archive(opened: OpenedBytes, wish: _Wish) -> NamedTensors:
    return ArchiveTensors(opened, weights_only=wish.weights_only, close=wish.close)


def _open_safetensors(opened: OpenedBytes, wish: _Wish) -> NamedTensors:
    return SafetensorsTensors(opened, close=wish.close)


def _open_legacy(opened: OpenedBytes, wish: _Wish) -> NamedTensors:
    return LegacyTensors(opened, weights_only=wish.weights_only, close=wish.close)


def _open_tar(opened: OpenedBytes, wish: _Wish) -> NamedTensors:
    return TarTensors(opened, weights_only=wish.weights_only, close=wish.close)


def _open_index(opened: OpenedBytes, wish: _Wish) -> NamedTensors:
    shards = shards_of(opened, wish.path)
    if shards is None:
        raise FileKindError(f"{opened.name}: {kinds.JSON}")
    return ShardedTensors(
        opened.name,
        shards,
        lambda path: open_tensors(path, backend=wish.backend, weights_only=wish.weights_only, is_shard=True),
        wish.close,
    )


def _open_dcp(opened: OpenedBytes, wish: _Wish) -> NamedTensors:
    from ..dcp_folder import DCPFolder  # imports torch.distributed
    from .dcp_tensors import DCPTensors

    folder = DCPFolder(opened, wish.path, wish.backend, weights_only=wish.weights_only)
    return DCPTensors(folder, weights_only=wish.weights_only, close=wish.close)


_OPENERS: dict[kinds.FileKind | None, Callable[[OpenedBytes, _Wish], NamedTensors]] = {
    None: _open_archive,
    kinds.SAFETENSORS: _open_safetensors,
    kinds.LEGACY: _open_legacy,
    kinds.TAR: _open_tar,
    kinds.JSON: _open_index,
    kinds.DCP_METADATA: _open_dcp,
}


def open_tensors(path: Any, *, backend: str, weights_only: bool, is_shard: bool = False) -> NamedTensors:
    """What is at a path or URL: a file of any kind that is read here, a folder of them, or an index.

    Args:
        backend, weights_only: as of :func:`~statedict_io.open_checkpoint`.
        is_shard: an index named it: it is a file, and no index.

    Raises:
        OSError, CorruptCheckpointError, FileKindError, pickle.UnpicklingError: as
            :func:`~statedict_io.open_checkpoint`.
    """
    given = path if is_url(path) else os.fsdecode(path)
    found = weights_in(given) if not is_shard and is_folder(given) else given
    kept = contextlib.ExitStack()  # empty until all has gone well
    with contextlib.ExitStack() as exit_stack:
        opened = exit_stack.enter_context(open_bytes(found, backend, random_access=True))
        kind = kind_of(opened)
        opener = _OPENERS.get(kind)
        if opener is None or (is_shard and kind in (kinds.JSON, kinds.DCP_METADATA)):
            raise FileKindError(f"{opened.name}: {kind}")
        tensors = opener(opened, _Wish(found, backend, weights_only, kept.close))
        kept.push(exit_stack.pop_all())
        return tensors
