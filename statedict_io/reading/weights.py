"""What ``load`` reads without ``torch.load``: safetensors files, weights in several shards, and directories of DCP."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.serialization

from .. import backends
from ..backends.protocol import Backend
from ..errors import FileKindError, LoadedKindError, StateDictIOError, as_raised, corrupt
from ..formats import kinds
from ..progress import ProgressCallback, over_parts
from ..remote.urls import is_url
from ..untrusted.limits import listed
from .load_steps import makes_no_data, wants_map, without_checksums
from .map_location import is_meta, only_device, saved_from_cpu_stays
from .opened_bytes import FileBytes, ObjectBytes, OpenedBytes
from .readahead import ReadAhead
from .weight_folders import Shards, shards_of, sizes_of, weights_in

if TYPE_CHECKING:
    from ..remote.ranges import RangedObject

#: loads one file: (path, progress=callback)
LoadFile = Callable[..., Any]


#: whether an index is being loaded: what it names is none
_in_index: ContextVar[bool] = ContextVar("statedict_io_in_index", default=False)


class Weights(Protocol):
    """Something that is loaded here."""

    def load(
        self, map_location: Any, wish: str, progress: ProgressCallback | None, *, verify: bool
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            map_location: as of :func:`~statedict_io.load`.
            wish: for a backend.
        """


def file_to_load(folder: Any) -> str:
    """The file of a folder.

    Raises:
        LoadedKindError: there is none, or nothing tells which; an IsADirectoryError too, which ``torch.load`` raises.
    """
    try:
        return weights_in(folder if isinstance(folder, str) else os.fsdecode(folder))
    except FileKindError as e:
        error = as_raised(LoadedKindError, IsADirectoryError, str(e))
        if isinstance(error, OSError):
            error.errno, error.filename = errno.EISDIR, os.fsdecode(folder)
        raise error from None


def opened_file(f: Any) -> contextlib.AbstractContextManager[io.BufferedReader | None]:
    """The file at a path; None for what is no path, or cannot be opened: ``torch.load`` says why."""
    if isinstance(f, (str, os.PathLike)):
        with contextlib.suppress(OSError, ValueError):
            return open(f, "rb")
    return contextlib.nullcontext()


def weights_of(
    file: io.BufferedReader | RangedObject | None,
    name: Any,
    backend: Backend,
    load_file: LoadFile,
    load_part: LoadFile,
    *,
    mmap: bool | None,
    weights_only: bool,
) -> Weights | None:
    """What a path or URL leads to; None where it is for ``torch.load``, which then says too what is wrong with it.

    Args:
        file: is read positionally, while it is open.
        name: of the file, for messages and for what is beside it.
        load_file: for files that an index names.
        load_part: loads an archive that is a part of a file: (part, progress=callback).
        mmap, weights_only: as of :func:`~statedict_io.load`; the latter for what is unpickled here.
    """
    if file is None:
        return None
    try:
        if isinstance(file, io.IOBase):
            opened: OpenedBytes = FileBytes(file.fileno(), os.fsdecode(name), backend)
        else:
            opened = ObjectBytes(file, backend)
        kind = kinds.of_start(opened.read_at(0, kinds.START_NBYTES), opened.name)
    except OSError:
        return None
    if kind is kinds.JSON:
        shards = shards_of(opened, opened.name)
        if shards is not None and _in_index.get():
            raise FileKindError(f"{opened.name}: {kinds.JSON}")
        return None if shards is None else _Sharded(shards, load_file)
    if kind is kinds.DCP_METADATA and not makes_no_data():
        if _in_index.get():
            raise FileKindError(f"{opened.name}: {kind}")
        return _OfRanks(opened, load_part, weights_only=weights_only)
    if kind is not kinds.SAFETENSORS or makes_no_data() or (wants_map(mmap) and opened.name.endswith(".safetensors")):
        return None
    return _Safetensors(opened)


class _Safetensors:
    def __init__(self, opened: OpenedBytes) -> None:
        self._opened = opened

    def load(
        self, map_location: Any, wish: str, progress: ProgressCallback | None, *, verify: bool
    ) -> dict[str, torch.Tensor]:
        if verify:
            raise ValueError(without_checksums(self._opened.name, "a safetensors file"))
        return load_safetensors(self._opened, map_location, wish, progress)


class _OfRanks:
    """A directory of torch.distributed.checkpoint."""

    def __init__(self, opened: OpenedBytes, load_part: LoadFile, *, weights_only: bool) -> None:
        self._opened = opened
        self._load_part = load_part
        self._weights_only = weights_only

    def load(self, map_location: Any, wish: str, progress: ProgressCallback | None, *, verify: bool) -> dict[str, Any]:
        """The state that was saved, nested as it was; ``load_part`` maps and verifies."""
        from .dcp_folder import DCPFolder, load_folder  # imports torch.distributed

        folder = DCPFolder(self._opened, self._opened.name, wish, weights_only=self._weights_only)
        try:
            return load_folder(folder, self._load_part, progress)
        finally:
            folder.close()


class _Sharded:
    def __init__(self, shards: Shards, load_file: LoadFile) -> None:
        self._shards = shards
        self._load_file = load_file

    def load(
        self, map_location: Any, wish: str, progress: ProgressCallback | None, *, verify: bool
    ) -> dict[str, torch.Tensor]:
        """All tensors of all shards, in the order of the index.

        Raises:
            CorruptCheckpointError: a shard does not have what the index says.
        """
        shards = self._shards
        parts = over_parts(progress, sizes_of(shards.paths))
        found: dict[str, Any] = {}
        for index, (path, part) in enumerate(zip(shards.paths, parts, strict=True)):
            if not is_url(path):
                os.stat(path)  # whoever would read it may not say which file is missing
            token = _in_index.set(True)
            try:
                loaded = self._load_file(path, progress=part)
            finally:
                _in_index.reset(token)
            if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
                raise corrupt(path, f"it holds a {type(loaded).__name__}, not a dict of tensors by name")
            shards.check(index, [*loaded])
            found.update(loaded)
        return {name: found[name] for name in shards.shard_of}


def load_safetensors(
    opened: OpenedBytes, map_location: Any, wish: str, progress: ProgressCallback | None
) -> dict[str, torch.Tensor]:
    """What ``safetensors.torch.load_file`` returns, read in parallel into the tensors' memory.

    Args:
        map_location: as of :func:`load`; the tensors are taken to have been saved from the CPU.
        wish: for a backend.

    Raises:
        CorruptCheckpointError: the file is not sound.
        StateDictIOError: there are tensors that this torch cannot hold.
    """
    from .safetensors_payloads import on_storage, open_safetensors

    file = open_safetensors(opened)
    unreadable = []
    for name, tensor in file.tensors.items():
        try:
            tensor.in_torch()
        except ValueError as e:
            unreadable.append(f"{name} ({e})")
    if unreadable:
        raise StateDictIOError(f"{opened.name}: not all of its tensors can be loaded: {listed(unreadable)}")
    if is_meta(map_location):
        return {name: file.like(name) for name in file.tensors}
    device = only_device(map_location, lambda: file.swaps)
    backends.warn_if_reading_is_slow(wish, device=device)
    stays = saved_from_cpu_stays(map_location)
    feed = ReadAhead(file.payloads, stay=stays, device=device, verify=False, progress=progress)
    restore: Callable[..., Any] = torch.serialization._get_restore_location(map_location)
    found = {}
    for name, tensor in file.tensors.items():
        dtype, shape = tensor.in_torch()
        storage = feed.take(name, tensor.nbytes)
        if file.swaps:
            storage.byteswap(dtype)
        if storage.device.type == "cpu":  # not read onto the device at once
            storage = restore(storage, "cpu")
        found[name] = on_storage(storage, dtype, shape)
    return found
