"""Storages on devices, through torch's Python API: for ``_core`` where no ``_torch`` module is there.

Copies go through side streams that come after the work of the caller's current streams, into and out of pinned memory,
and are waited for by events; nothing is synchronised device-wide. ``_core`` calls everything here with the GIL,
:meth:`DeviceSource.copy` and :meth:`DeviceDestination.copy` from several threads at once; what waits gives the GIL up
meanwhile. Pieces name addresses: the memory there stays until the copy has ended.

Modes of the calling thread (inference, default devices, Python dispatch) have no part in a copy.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import torch

Record = tuple[torch.UntypedStorage, int, int]  # storage, offset of the first byte, number of bytes

# One copy costs tens of microseconds whatever its size: so many pieces below this are gathered on the device.
_GATHER_BELOW_NBYTES = 128 << 10
_GATHER_NBYTES = 64 << 20  # of clones, at most in one piece of memory
_ALIGNMENT = 4096  # direct I/O asks for it

_WRITABLE = 0x200  # PyBUF_WRITE
_memory_at = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_at.restype = ctypes.py_object
_memory_at.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]


def pinned(nbytes: int) -> tuple[object, int] | None:
    """Memory that an accelerator copies from and to at full speed.

    Returns:
        (what owns it, its address, a multiple of 4096), or None where it cannot be had.
    """
    try:
        with _plainly():
            memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError:
        return None
    address: int = memory.data_ptr()
    return (memory, address) if address % _ALIGNMENT == 0 else None


def source(records: Sequence[Record | None]) -> DeviceSource:
    """Storages to copy from, after what is queued now on the calling thread's current streams.

    Raises:
        RuntimeError: a device has no streams or no events.
    """
    return DeviceSource(records)


class DeviceSource:
    def __init__(self, records: Sequence[Record | None]) -> None:
        self._records = records
        self._side_streams: dict[torch.device, Any] = {}
        for record in records:
            if record is not None and record[0].device not in self._side_streams:
                self._side_streams[record[0].device] = _side_stream(record[0].device)

    def copy(self, pieces: Sequence[tuple[int, int, int, int]], bounce: int | None) -> None:
        """Returns when every byte is at its destination, or raises when nothing is under way any more.

        Args:
            pieces: (record, offset in it, number of bytes, destination address).
            bounce: the address of room for all pieces, through which small ones are gathered.
        """
        of_device: dict[torch.device, list[tuple[int, int, int, int]]] = {}
        for piece in pieces:
            record = self._records[piece[0]]
            assert record is not None, f"record {piece[0]} is not on a device"
            of_device.setdefault(record[0].device, []).append(piece)
        for device, some in of_device.items():
            self._copy_from(device, some, bounce)

    def _copy_from(self, device: torch.device, pieces: Sequence[tuple[int, int, int, int]], bounce: int | None) -> None:
        small = [] if bounce is None else [piece for piece in pieces if piece[2] < _GATHER_BELOW_NBYTES]
        gathered = None  # must live until the copy from it has ended
        with _queueing(self._side_streams[device]) as landed:
            for piece in pieces:
                if not small or piece[2] >= _GATHER_BELOW_NBYTES:
                    self._queue(piece)
            if small:
                gathered = _gathered([self._bytes_of(*piece[:3]) for piece in small])
                if gathered is None:
                    for piece in small:
                        self._queue(piece)
                else:
                    _host_bytes(bounce, gathered.numel()).copy_(gathered, non_blocking=True)
            landed.wait()
        if gathered is not None and bounce is not None:
            for _, _, nbytes, destination in small:
                ctypes.memmove(destination, bounce, nbytes)
                bounce += nbytes

    def _queue(self, piece: tuple[int, int, int, int]) -> None:
        record, offset, nbytes, destination = piece
        _host_bytes(destination, nbytes).copy_(self._bytes_of(record, offset, nbytes), non_blocking=True)

    def _bytes_of(self, record: int, offset: int, nbytes: int) -> Any:
        found = self._records[record]
        assert found is not None
        return _device_bytes(found[0], found[1] + offset, nbytes)


def destination(device: str, sizes: Sequence[int]) -> DeviceDestination | None:
    """New storages on ``device``, of ``sizes`` bytes, to be filled.

    Copies come after what is queued now on the calling thread's current stream there.

    Returns:
        None where the device has no streams, no events or no room: torch's own way copes with the one and reports the
        other.
    """
    try:
        return DeviceDestination(torch.device(device), sizes)
    except (RuntimeError, AssertionError):  # the latter: a torch that was not built for the device
        return None


class DeviceDestination:
    def __init__(self, device: torch.device, sizes: Sequence[int]) -> None:
        with _plainly():
            made = [torch.empty(nbytes, dtype=torch.uint8, device=device) for nbytes in (*sizes, 0)]
        self._storages = [tensor.untyped_storage() for tensor in made[:-1]]
        # Now, that what the allocator queued for them comes before the copies too; and there, as `device` may have no
        # index.
        self._side_stream = _side_stream(made[-1].device)

    def copy(self, pieces: Sequence[tuple[int, int, int, int]]) -> Copies:
        """Queues copies and returns; raises when nothing is under way any more.

        Args:
            pieces: (index into ``sizes``, offset there, number of bytes, source address).
        """
        with _queueing(self._side_stream) as landed:
            for request, offset, nbytes, address in pieces:
                to = _device_bytes(self._storages[request], offset, nbytes)
                to.copy_(_host_bytes(address, nbytes), non_blocking=True)
            landed.record()
            return Copies(landed, self)

    def storages(self) -> list[torch.UntypedStorage]:
        """For any stream, once all copies have been waited for."""
        return self._storages


class Copies:
    """Copies that were queued. Dropped before :meth:`wait`, they are waited for: their memory is used again."""

    def __init__(self, landed: _Landing, filled: DeviceDestination) -> None:
        self._landed = landed
        self._filled = filled  # its memory must not be given back meanwhile

    def wait(self) -> None:
        self._landed.wait()

    def __del__(self) -> None:
        self._landed.settle()


def clones(records: Sequence[Record | None]) -> DeviceClones | None:
    """Copies of storages in the memory of their devices, queued on the calling thread's current streams: what it queues
    there afterwards comes after them.

    Returns:
        None where a device has no room.
    """
    try:
        return DeviceClones(records)
    except torch.OutOfMemoryError:
        return None


class DeviceClones:
    def __init__(self, records: Sequence[Record | None]) -> None:
        #: In the form of the originals; None for those without bytes too.
        self.records: list[Record | None] = [None] * len(records)
        on_device: dict[torch.device, list[int]] = {}
        for i, record in enumerate(records):
            if record is not None:
                on_device.setdefault(record[0].device, []).append(i)
        self._copied = []
        with _plainly():
            for device, indices in on_device.items():
                self._clone(device, [(i, record) for i in indices if (record := records[i]) is not None and record[2]])
                event = torch.Event(device=device)
                event.record(torch.accelerator.current_stream(device))
                self._copied.append(event)

    def _clone(self, device: torch.device, records: Sequence[tuple[int, Record]]) -> None:
        small: list[tuple[int, Any]] = []
        small_nbytes = 0
        for i, record in records:
            original = _device_bytes(*record)
            if record[2] >= _GATHER_BELOW_NBYTES:
                clone = torch.empty(record[2], dtype=torch.uint8, device=device)
                clone.copy_(original, non_blocking=True)
                self.records[i] = (clone.untyped_storage(), 0, record[2])
                continue
            small.append((i, original))
            small_nbytes += record[2]
            if small_nbytes >= _GATHER_NBYTES:
                self._clone_together(small)
                small, small_nbytes = [], 0
        if small:
            self._clone_together(small)

    def _clone_together(self, originals: Sequence[tuple[int, Any]]) -> None:
        storage = torch.cat([original for _, original in originals]).untyped_storage()
        offset = 0
        for i, original in originals:
            self.records[i] = (storage, offset, original.numel())
            offset += original.numel()

    def done(self) -> bool:
        """Whether :meth:`wait` would return, or raise, at once."""
        try:
            return all(event.query() for event in self._copied)
        except RuntimeError:
            return True

    def wait(self) -> None:
        for event in self._copied:
            event.synchronize()


class _Landing:
    """The end of the copies that were queued on a stream before :meth:`record`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._event: Any = None
        self._is_over = False

    def record(self) -> None:
        self._event = torch.Event(device=self._stream.device)
        self._event.record(self._stream)

    def wait(self) -> None:
        if self._event is None:
            self.record()
        self._event.synchronize()
        self._is_over = True

    def settle(self) -> None:
        """Returns when nothing is under way, whatever failed."""
        if not self._is_over:
            self._is_over = True
            # A lost device copies nothing any more; the first error is the one to report.
            with contextlib.suppress(RuntimeError):
                self._stream.synchronize()


@contextlib.contextmanager
def _queueing(stream: Any) -> Iterator[_Landing]:
    """What is queued within goes to ``stream``; where that fails, none of it is under way any more."""
    landing = _Landing(stream)
    before = torch.accelerator.current_stream(stream.device)
    with _on_device(stream.device), _plainly():
        torch.accelerator.set_stream(stream)
        try:
            yield landing
        except BaseException:
            landing.settle()
            raise
        finally:
            torch.accelerator.set_stream(before)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes it the calling thread's current device; afterwards no device is made current that nobody uses."""
    index = getattr(torch.accelerator, "device_index", None)  # torch 2.9
    return index(device.index) if index is not None else torch.get_device_module(device).device(device.index)


def _side_stream(device: torch.device) -> Any:
    try:
        stream = torch.Stream(device)
        stream.wait_stream(torch.accelerator.current_stream(device))
    except ValueError as e:  # not the accelerator that torch takes for the current one
        raise RuntimeError(f"no streams on {device}: {e}") from None
    return stream


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Below autograd, and below any mode of the calling thread."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.inference_mode():
        yield


def _host_bytes(address: int | None, nbytes: int) -> Any:
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(_memory_at(address, nbytes, _WRITABLE), dtype=torch.uint8)


def _device_bytes(storage: torch.UntypedStorage, offset: int, nbytes: int) -> Any:
    if offset + nbytes > storage.nbytes():  # set_() would make it larger, with whatever bytes
        raise RuntimeError(
            f"a storage on {storage.device} was resized while it was being copied: "
            f"bytes up to {offset + nbytes} were planned, it has {storage.nbytes()}"
        )
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, offset, (nbytes,), (1,))


def _gathered(tensors: Sequence[Any]) -> Any:
    """None where the device has no room."""
    try:
        return torch.cat(list(tensors))
    except torch.OutOfMemoryError:
        return None
