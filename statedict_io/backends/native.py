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
from ..system.file_digest import FileDigest
from ..system.processes import in_forked_child
from . import slower
from .extension import find, known
from .protocol import Records, StorageRange, Strip

if TYPE_CHECKING:
    from ..archive.payload_ranges import RangeEntries
    from ..pickles.lean_pickle import LeanPickle
    from .native_reading import NativeOpenArchive

# Below this a durable save is bound by the fsync, and direct writes only add waiting.
_DIRECT_FROM_NBYTES = 4 << 20
# Without the flush the page cache takes the file at memory speed, until the kernel makes writers wait for the disk.
_BUFFERED_BELOW_NBYTES = 1 << 30


class _NativeContent:
    """What writes, of the extension: a PlannedFile or a Snapshot."""

    in_any_order = True

    def __init__(self, source: Any) -> None:
        self._source = source
        self.nbytes: int = source.nbytes

    def write_fd(
        self,
        fd: int,
        *,
        durable: bool,
        progress: ProgressCallback | None,
        bytes_per_second: float | None = None,
        digest: FileDigest | None = None,
    ) -> None:
        if durable:
            direct = self.nbytes >= _DIRECT_FROM_NBYTES
        else:
            direct = self.nbytes > _BUFFERED_BELOW_NBYTES and self.nbytes > host_memory.unthrottled_nbytes()
        sha256 = None if digest is None else bytearray(32)
        self._source.write_fd(
            fd,
            direct="auto" if direct else "off",
            progress=progress,
            bytes_per_second=bytes_per_second or 0.0,
            sha256=sha256,
        )
        if digest is not None and sha256 is not None:
            digest.give(sha256)

    def write_stream(self, write: Callable[[memoryview], Any], *, progress: ProgressCallback | None) -> None:
        self._source.write_stream(write, progress=progress)


class NativeFile(_NativeContent):
    """See :class:`~statedict_io.backends.protocol.PlannedFile`."""

    @property
    def device_nbytes(self) -> dict[str, int]:
        return self._source.device_nbytes

    def snapshot_nbytes(self, *, on_devices: bool) -> int:
        return self._source.snapshot_nbytes(on_devices=on_devices)

    def snapshot(self, *, on_devices: bool, max_nbytes: int) -> NativeSnapshot | None:
        snapshot = self._source.snapshot(on_devices=on_devices, max_nbytes=max_nbytes)
        return None if snapshot is None else NativeSnapshot(snapshot)


class NativeSnapshot(_NativeContent):
    """See :class:`~statedict_io.backends.protocol.Snapshot`."""

    def done(self) -> bool:
        source = self._source  # another thread may release it
        return source is None or source.done()

    def wait(self) -> None:
        source = self._source
        if source is not None:
            source.wait()

    def release(self) -> None:
        self._source = None


class NativeBackend:
    """See :class:`~statedict_io.backends.protocol.Backend`.

    Args:
        extension: the module ``_core``, in use.
    """

    name = "native"

    def __init__(self, extension: ModuleType) -> None:
        self._extension = extension

    def native_tables(self) -> NativeTables:
        return cast(NativeTables, self._extension)

    def plan(self, archive_name: str, records: Records, *, alignment: int, compute_crc32: bool) -> NativeFile:
        of_extension = isinstance(records.table, self._extension.StorageTable)
        return self._plan(
            lambda device_types: self._extension.PlannedArchive(
                archive_name,
                records.head,
                records.table if of_extension else records.table.storages,
                records.tail,
                alignment=alignment,
                compute_crc32=compute_crc32,
                skip_data=records.skip_data,
                device_types=device_types,
            )
        )

    def plan_gapless(self, parts: Sequence[bytes | StorageRange]) -> NativeFile:
        return self._plan(lambda device_types: self._extension.GaplessFile(parts, device_types=device_types))

    def _plan(self, make: Callable[[list[str]], Any]) -> NativeFile:
        """``make`` is given the types of the devices that the pipeline is to copy from."""
        try:
            planned = NativeFile(make(_device_types()))
        except self._extension.DeviceWithoutStreams:
            planned = NativeFile(make([]))
        _warn_if_slow(lambda: bool(planned.device_nbytes))
        return planned

    def write_strips(
        self,
        path: str,
        storages: Sequence[torch.UntypedStorage],
        strips: Sequence[Strip],
        *,
        durable: bool,
        compute_crc32: bool,
        progress: ProgressCallback | None,
    ) -> list[tuple[int, bytes]]:
        from .strips import open_existing

        device_types = _device_types()
        _warn_if_slow(lambda: any(storage.device.type in device_types for storage in storages))
        nbytes = sum(strip.row_nbytes * strip.num_rows for strip in strips)
        with open_existing(path) as fd, open_existing(path) as direct_fd:

            def write(types: Sequence[str]) -> list[tuple[int, bytes]]:
                results: list[tuple[int, bytes]] = self._extension.write_strips(
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
            except self._extension.DeviceWithoutStreams:
                results = write(["cpu"])
            if durable:
                sync(fd)
        return results

    def open_archive(self, fd: int, path: str) -> NativeOpenArchive:
        from .native_reading import NativeOpenArchive

        return NativeOpenArchive(self._extension, fd, path)

    def open_payloads(self, fd: int, path: str, payloads: RangeEntries) -> NativeOpenArchive:
        from .native_reading import NativeOpenArchive

        return NativeOpenArchive(self._extension, fd, path, payloads=payloads)

    def lean_pickle(self, data_pkl: bytes) -> LeanPickle:
        from ..pickles.lean_pickle import LeanPickle, TensorCall

        try:
            stream, calls = self._extension.abridged_pickle(data_pkl)
        except UnicodeDecodeError:
            return LeanPickle.unchanged(data_pkl)  # the unpickler's to refuse
        return LeanPickle(stream, [*map(TensorCall._make, calls)])

    def release_buffers(self) -> None:
        self._extension.release_buffers()

    def snapshot_memory_nbytes(self) -> int:
        nbytes: int = self._extension.snapshot_pool_nbytes()
        return nbytes


def _device_types() -> list[str]:
    """With streams and pinned memory, as a rule. Storages elsewhere are copied to the CPU first, as torch.save does."""
    return ["cuda", "xpu", torch._C._get_privateuse1_backend_name()]


def _warn_if_slow(on_device: Callable[[], bool]) -> None:
    """``on_device`` tells whether something that is to be saved is on a device; asked where that makes a difference."""
    torch_info = find().torch_info
    if not torch_info and not slower.has_warned() and on_device():
        slower.warn(torch_info.reason)


def _start_anew() -> None:
    """In a forked child: storages that a thread of the parent was writing."""
    found = known()
    if found is not None and found.core is not None:
        found.core.forget_fixed_storages()


in_forked_child(_start_anew)
