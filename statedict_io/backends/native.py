"""The backend that drives the compiled extension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch

from ..pickles.pickling import NativeTables
from ..progress import ProgressCallback
from ..system import host_memory
from ..system.descriptors import sync
from ..system.processes import in_forked_child
from . import slower
from .extension import find, known
from .protocol import Contents, Strip

if TYPE_CHECKING:
    from ..pickles.lean_pickle import LeanPickle
    from .native_reader import NativeReader

name = "native"

# Below this a durable save is bound by the fsync, and direct writes only add waiting.
_DIRECT_FROM_NBYTES = 4 << 20
# Without the flush the page cache takes the file at memory speed, until the kernel makes writers wait for the disk.
_BUFFERED_BELOW_NBYTES = 1 << 30


def _core() -> ModuleType:
    """The module; this backend is chosen only where it is in use."""
    found = find()
    assert found.core is not None, found.core_info.reason
    return found.core


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
        return self._archive.snapshot_nbytes(on_devices=on_devices)

    def snapshot(self, *, on_devices: bool, max_nbytes: int) -> NativeSnapshot | None:
        snapshot = self._archive.snapshot(on_devices=on_devices, max_nbytes=max_nbytes)
        return None if snapshot is None else NativeSnapshot(snapshot)


class NativeSnapshot:
    """See :class:`~statedict_io.backends.protocol.Snapshot`."""

    in_any_order = True

    def __init__(self, snapshot: Any) -> None:
        self._snapshot = snapshot
        self.nbytes = snapshot.nbytes

    def done(self) -> bool:
        snapshot = self._snapshot  # another thread may release it
        return snapshot is None or snapshot.done()

    def wait(self) -> None:
        snapshot = self._snapshot
        if snapshot is not None:
            snapshot.wait()

    def release(self) -> None:
        self._snapshot = None

    def write_fd(
        self, fd: int, *, durable: bool, progress: ProgressCallback | None, bytes_per_second: float | None = None
    ) -> None:
        _write_fd(self._snapshot, fd, durable, progress, bytes_per_second)

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        self._snapshot.write_stream(write, progress=progress)


def _write_fd(
    source: Any, fd: int, durable: bool, progress: ProgressCallback | None, bytes_per_second: float | None
) -> None:
    if durable:
        direct = source.nbytes >= _DIRECT_FROM_NBYTES
    else:
        direct = source.nbytes > _BUFFERED_BELOW_NBYTES and source.nbytes > host_memory.unthrottled_nbytes()
    source.write_fd(fd, direct="auto" if direct else "off", progress=progress, bytes_per_second=bytes_per_second or 0.0)


def _device_types() -> list[str]:
    """With streams and pinned memory, as a rule. Storages elsewhere are copied to the CPU first, as torch.save does."""
    return ["cuda", "xpu", torch._C._get_privateuse1_backend_name()]


def native_tables() -> NativeTables:
    extension = _core()
    return cast(NativeTables, extension)


def plan(archive_name: str, contents: Contents, *, alignment: int, compute_crc32: bool) -> NativeArchive:
    extension = _core()

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
        archive = NativeArchive(make(_device_types()))
    except extension.DeviceWithoutStreams:
        archive = NativeArchive(make([]))
    _warn_if_slow(lambda: bool(archive.device_nbytes))
    return archive


def _warn_if_slow(on_device: Callable[[], bool]) -> None:
    """``on_device`` tells whether something that is to be saved is on a device; asked where that makes a difference."""
    torch_info = find().torch_info
    if not torch_info and not slower.has_warned() and on_device():
        slower.warn(torch_info.reason)


def open_archive(fd: int, path: str) -> NativeReader:
    from .native_reader import NativeReader

    extension = _core()
    return NativeReader(extension, fd, path)


def lean_pickle(data_pkl: bytes) -> LeanPickle:
    from ..pickles.lean_pickle import LeanPickle, TensorCall

    extension = _core()
    try:
        stream, calls = extension.abridged_pickle(data_pkl)
    except UnicodeDecodeError:
        return LeanPickle.unchanged(data_pkl)  # the unpickler's to refuse
    return LeanPickle(stream, [*map(TensorCall._make, calls)])


def release_buffers() -> None:
    extension = find().core
    if extension is not None:
        extension.release_buffers()


def snapshot_memory_nbytes() -> int:
    extension = find().core
    return 0 if extension is None else extension.snapshot_pool_nbytes()


def _start_anew() -> None:
    """In a forked child: storages that a thread of the parent was writing."""
    found = known()
    if found is not None and found.core is not None:
        found.core.forget_fixed_storages()


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
    from .strips import opened

    extension = _core()
    device_types = _device_types()
    _warn_if_slow(lambda: any(storage.device.type in device_types for storage in storages))
    nbytes = sum(strip.row_nbytes * strip.num_rows for strip in strips)
    with opened(path) as fd, opened(path) as direct_fd:

        def write(types: Sequence[str]) -> list[tuple[int, bytes]]:
            results: list[tuple[int, bytes]] = extension.write_strips(
                [storage if storage.device.type in types else storage.cpu() for storage in storages],
                strips,
                direct_fd=direct_fd,
                fd=fd,
                direct="auto" if durable and nbytes >= _DIRECT_FROM_NBYTES else "off",
                compute_crc32=compute_crc32,
                progress=progress,
            )
            return results

        try:
            results = write(["cpu", *device_types])
        except extension.DeviceWithoutStreams:
            results = write(["cpu"])
        if durable:
            sync(fd)
    return results
