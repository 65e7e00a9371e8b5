"""The backend that drives the compiled extension."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import torch

from .. import host_memory
from ..pickling import NativeTables
from ..processes import in_forked_child
from ..progress import ProgressCallback
from ..proofs import is_shortage
from . import torch_access
from .native_reader import NativeReader
from .protocol import Contents, LeanPickle, Strip, TensorCall
from .strips import opened

name = "native"

_REBUILD = "STATEDICT_IO_BUILD=native pip install --force-reinstall --no-deps --no-cache-dir ., in the source tree"
# With streams and pinned memory. Storages elsewhere are copied to the CPU first, as torch.save does.
_DEVICE_TYPES = ["cuda", "xpu"]
# Below this a durable save is bound by the fsync, and direct writes only add waiting.
_DIRECT_FROM_NBYTES = 4 << 20
# Without the flush the page cache takes the file at memory speed, until the kernel makes writers wait for the disk.
_BUFFERED_BELOW_NBYTES = 1 << 30


_loaded: tuple[ModuleType | None, str, str | None] | None = None


def load() -> tuple[ModuleType | None, str, str | None]:
    """(the extension or None, why, the torch it was built for or None). Never raises. Tried once, and again where it
    failed for want of memory or file descriptors."""
    global _loaded
    if _loaded is not None:
        return _loaded
    shortage, found = _try_to_load()
    if not shortage:
        _loaded = found
    return found


def _try_to_load() -> tuple[bool, tuple[ModuleType | None, str, str | None]]:
    """(whether it failed for want of something, as :func:`load`)."""
    try:
        core = importlib.import_module("statedict_io._core")
        core.use_torch_access(torch_access)
    except ModuleNotFoundError:
        return False, (None, f"this installation has no compiled extension; to build it: {_REBUILD}", None)
    except Exception as e:  # a damaged file can raise nearly anything
        shortage = is_shortage(e)
        cure = "" if shortage else f"; to rebuild it: {_REBUILD}"
        return shortage, (None, f"the extension cannot be loaded: {e}{cure}", None)
    # Major and minor: torch's C++ interface is stable within a minor release, and a build against the CPU libraries
    # serves all devices.
    name = "_torch_{}_{}".format(*torch.__version__.split(".")[:2])
    try:
        for_torch = importlib.import_module(f"statedict_io.{name}")
        core.use_torch_functions(for_torch.functions)
    except ModuleNotFoundError:
        return False, (core, f"_core is in use; there is no {name}", None)
    except Exception as e:
        return is_shortage(e), (core, f"_core is in use; {name} cannot be: {e}", None)
    return False, (core, f"_core and {name} are in use", for_torch.built_for)


class NativeArchive:
    """See :class:`~statedict_io.backends.protocol.Archive`."""

    in_any_order = True

    def __init__(self, archive: Any) -> None:
        self._archive = archive

    @property
    def nbytes(self) -> int:
        return self._archive.nbytes

    def write_fd(
        self, fd: int, *, durable: bool, progress: ProgressCallback | None, bytes_per_second: float | None = None
    ) -> None:
        _write_fd(self._archive, fd, durable, progress, bytes_per_second)

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        self._archive.write_stream(write, progress=progress)

    @property
    def device_nbytes(self) -> dict[str, int]:
        return self._archive.device_nbytes

    def snapshot_nbytes(self, *, on_devices: bool) -> int:
        return self._archive.packed_nbytes if on_devices else self._archive.image_nbytes

    def snapshot(self, *, on_devices: bool, max_nbytes: int) -> NativeSnapshot | None:
        if not on_devices:
            return NativeSnapshot(self._archive.image(max_nbytes=max_nbytes), None)
        cloned = self._archive.clone(max_nbytes=max_nbytes)
        return NativeSnapshot(self._archive, self._archive) if cloned else None


class NativeSnapshot:
    """See :class:`~statedict_io.backends.protocol.Snapshot`."""

    in_any_order = True

    def __init__(self, source: Any, clone: Any) -> None:
        self._source = source  # an Image, or an Archive that refers to copies
        self._clone = clone  # that Archive, whose copies may still be on their way
        self.nbytes = source.nbytes

    def done(self) -> bool:
        clone = self._clone
        return clone is None or clone.clone_done()

    def wait(self) -> None:
        clone = self._clone
        if clone is not None:
            clone.wait_clone()

    def release(self) -> None:
        self._source = self._clone = None

    def write_fd(
        self, fd: int, *, durable: bool, progress: ProgressCallback | None, bytes_per_second: float | None = None
    ) -> None:
        _write_fd(self._source, fd, durable, progress, bytes_per_second)

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        self._source.write_stream(write, progress=progress)


def _write_fd(
    source: Any, fd: int, durable: bool, progress: ProgressCallback | None, bytes_per_second: float | None
) -> None:
    if durable:
        direct = source.nbytes >= _DIRECT_FROM_NBYTES
    else:
        direct = source.nbytes > _BUFFERED_BELOW_NBYTES and source.nbytes > host_memory.unthrottled_nbytes()
    source.write_fd(fd, direct="auto" if direct else "off", progress=progress, bytes_per_second=bytes_per_second or 0.0)


def native_tables() -> NativeTables:
    extension, reason, _ = load()
    assert extension is not None, reason
    return cast(NativeTables, extension)


def plan(archive_name: str, contents: Contents, *, alignment: int, compute_crc32: bool) -> NativeArchive:
    extension, reason, _ = load()
    assert extension is not None, reason

    def make(device_types: list[str]) -> Any:
        return extension.Archive(
            archive_name,
            contents.head,
            contents.table if isinstance(contents.table, extension.StorageTable) else contents.table.storages,
            contents.tail,
            alignment=alignment,
            compute_crc32=compute_crc32,
            skip_data=contents.skip_data,
            device_types=device_types,
        )

    try:
        return NativeArchive(make([*_DEVICE_TYPES, torch._C._get_privateuse1_backend_name()]))
    except RuntimeError:  # an out-of-tree device without streams or events
        return NativeArchive(make([]))


def open_archive(fd: int, path: str) -> NativeReader:
    extension, reason, _ = load()
    assert extension is not None, reason
    return NativeReader(extension, fd, path)


def lean_pickle(data_pkl: bytes) -> LeanPickle:
    extension, reason, _ = load()
    assert extension is not None, reason
    try:
        stream, calls = extension.abridged_pickle(data_pkl)
    except UnicodeDecodeError:
        return LeanPickle.unchanged(data_pkl)  # the unpickler's to refuse
    return LeanPickle(stream, [*map(TensorCall._make, calls)])


def release_buffers() -> None:
    extension, _, _ = load()
    if extension is not None:
        extension.release_buffers()


def snapshot_memory_nbytes() -> int:
    extension, _, _ = load()
    return 0 if extension is None else extension.snapshot_pool_nbytes()


def _start_anew() -> None:
    """In a forked child: storages that a thread of the parent was writing."""
    if _loaded is not None and _loaded[0] is not None:
        _loaded[0].forget_fixed_storages()


in_forked_child(_start_anew)


def write_strips(
    path: str,
    storages: Sequence[torch.UntypedStorage],
    strips: Sequence[Strip],
    *,
    durable: bool,
    compute_crc32: bool,
    progress: ProgressCallback | None,
) -> list[tuple[int, bytes]]:
    extension, reason, _ = load()
    assert extension is not None, reason
    known = ("cpu", *_DEVICE_TYPES, torch._C._get_privateuse1_backend_name())
    held = [storage if storage.device.type in known else storage.cpu() for storage in storages]
    nbytes = sum(strip.row_nbytes * strip.num_rows for strip in strips)
    with opened(path) as fd, opened(path) as direct_fd:
        results: list[tuple[int, bytes]] = extension.write_strips(
            held,
            strips,
            direct_fd=direct_fd,
            fd=fd,
            direct="auto" if durable and nbytes >= _DIRECT_FROM_NBYTES else "off",
            compute_crc32=compute_crc32,
            progress=progress,
        )
        if durable:
            os.fsync(fd)
    return results
