"""Tensors whose elements lie in the payloads of an open file: any part of any of them."""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from ...archive.record_rows import RowsOfRecord
from ...errors import corrupt
from ..payloads import StoredPayloads
from .strided_reads import as_bits, fills, memory_of, span_of


class Filling(NamedTuple):
    """Arguments of :meth:`StoredTensors.read`."""

    record: int
    view: torch.Tensor
    target: torch.Tensor


class StoredTensors:
    """Reads tensors of an open file: of a payload, given by its index, what a placeholder says, or a view of one. That
    is a tensor on the meta device whose storage stands for the payload.

    Reading may be done from several threads.

    Args:
        payloads: of the file, which stays open as long as this is used.
        swaps: the file has the other byte order than this machine.
        max_overhead: views are read with what lies between their elements if that is so many times their bytes at most;
            it saves system calls.
        keeps_inflated: keep the last compressed record that was read, for other parts of it.

    Methods raise:
        CorruptCheckpointError: the tensor reaches beyond its payload, or that is unsound.
        OSError: the file cannot be read.
        ValueError: it is closed.
    """

    def __init__(
        self,
        payloads: StoredPayloads,
        *,
        swaps: bool = False,
        max_overhead: float = 2,
        keeps_inflated: bool = False,
    ) -> None:
        self._payloads = payloads
        self._swaps = swaps
        self._max_overhead = max_overhead
        self._keeps_inflated = keeps_inflated
        self._inflated: tuple[int, torch.UntypedStorage] | None = None
        self._headers_read: set[int] = set()
        self._count_lock = threading.Lock()
        self._closed = False
        self.bytes_read = 0  #: of the file: headers and payloads

    @property
    def payloads(self) -> StoredPayloads:
        if self._closed:
            raise ValueError(f"{self._payloads.path}: the checkpoint is closed")
        return self._payloads

    @property
    def path(self) -> str:
        """As given."""
        return self._payloads.path

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self._payloads.file_nbytes

    def close(self) -> None:
        """What was read stays valid."""
        self._closed = True

    def check(self, record: int, tensor: torch.Tensor) -> None:
        """Raises where ``tensor`` reaches beyond the payload."""
        if tensor.numel():
            end = (tensor.storage_offset() + span_of(tensor.shape, tensor.stride())) * tensor.element_size()
            entry = self._payloads.entries[record]
            if end > entry.nbytes:
                raise corrupt(
                    self.path, f"a tensor reaches to byte {end} of record {entry.name!r}, which has {entry.nbytes}"
                )

    def offset_of(self, record: int, tensor: torch.Tensor) -> int | None:
        """Where a tensor's first byte is in the file; None where its bytes do not lie there as they are."""
        self.check(record, tensor)
        if self._payloads.entries[record].compressed:
            return None
        return self.payloads.archive.payload_offset(record) + tensor.storage_offset() * tensor.element_size()

    def is_compressed(self, record: int) -> bool:
        """Whether tensors in a payload can be read only as a whole."""
        return self._payloads.entries[record].compressed

    def tensor(self, record: int, placeholder: torch.Tensor) -> torch.Tensor:
        """With its data, on the CPU, with the strides that it was saved with and memory of its own."""
        self.check(record, placeholder)
        itemsize = placeholder.element_size()
        begin = placeholder.storage_offset() * itemsize
        nbytes = span_of(placeholder.shape, placeholder.stride()) * itemsize
        entry = self._payloads.entries[record]
        if entry.compressed or (begin == 0 and nbytes == entry.nbytes):
            storage = self.payloads.archive.load_storages([record], verify=False, progress=None)[0]
            offset = placeholder.storage_offset()
            self._count(record, entry.stored_nbytes)
        else:
            part = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            self._read(record, begin, memory_of(part))
            storage, offset = part.untyped_storage(), 0
        if self._swaps:
            storage.byteswap(placeholder.dtype)
        tensor = torch.empty(0, dtype=placeholder.dtype, device="cpu")
        return _finished(tensor.set_(storage, offset, placeholder.shape, placeholder.stride()), placeholder)

    def view(self, record: int, view: torch.Tensor) -> torch.Tensor:
        """A view of a placeholder as a contiguous tensor on the CPU, or where its elements lie on top of each other as
        one that does too."""
        span = span_of(view.shape, view.stride())
        if view.numel() > span:
            elements = torch.empty(span, dtype=view.dtype, device="cpu")
            self.read(record, view.detach().as_strided((span,), (1,)), elements)
            return _finished(elements.as_strided(view.shape, view.stride()), view)
        out = torch.empty(view.shape, dtype=view.dtype, device="cpu")
        self.read(record, view, out)
        return _finished(out, view)

    def read(self, record: int, view: torch.Tensor, target: torch.Tensor) -> None:
        """Fills a tensor with the elements of a view of a placeholder, read straight into it where it is on the CPU,
        has the view's dtype and lies in the order of the file.

        Args:
            view: those that are conjugates or negatives give the elements as they are in the file.
            target: of the same shape, with any strides, dtype, device.
        """
        self.read_all([Filling(record, view, target)])

    @property
    def gathered_nbytes(self) -> int:
        """So much of :meth:`read_all` is read at once; 0: one after the other."""
        return self.payloads.archive.gathered_nbytes

    def read_all(self, fillings: Iterable[Filling]) -> None:
        """As :meth:`read`, all of them, side by side where the file is far away."""
        archive = self.payloads.archive
        queue = collections.deque(self._fills(filling) for filling in fillings)
        while queue:
            batch: list[RowsOfRecord] = []
            ready: list[Iterator[RowsOfRecord]] = []
            nbytes = 0
            while queue and (not batch or nbytes < archive.gathered_nbytes):
                fills = queue.popleft()
                rows = next(fills, None)
                if rows is not None:
                    batch.append(rows)
                    ready.append(fills)
                    nbytes += rows.destination.nbytes
            if batch:
                archive.read_rows(batch)
            for rows in batch:
                self._count(rows.record, rows.destination.nbytes)
            queue.extendleft(reversed(ready))  # those first whose memory waits

    def _fills(self, filling: Filling) -> Iterator[RowsOfRecord]:
        """Yields what is to be read, and is to be continued when it has been."""
        record, view, target = filling
        self.check(record, view)
        view, target = view.detach(), target.detach()
        if view.numel() == 0:
            return
        if self._payloads.entries[record].compressed:
            whole = torch.empty(0, dtype=view.dtype, device="cpu").set_(
                self._inflate(record), view.storage_offset(), view.shape, view.stride()
            )
            self._copy(whole, target, fresh=False)
            return
        is_direct = (
            not self._swaps
            and target.device.type == "cpu"
            and target.dtype == view.dtype
            and not target.is_conj()
            and not target.is_neg()
        )
        for rows in fills(
            as_bits(target) if is_direct else target,
            view.storage_offset(),
            view.stride(),
            cheap_nbytes=self._payloads.cheap_nbytes,
            max_overhead=self._max_overhead,
            dtype=None if is_direct else view.dtype,
            copy=None if is_direct else functools.partial(self._copy, fresh=True),
        ):
            yield RowsOfRecord(record, *rows)

    def _copy(self, elements: torch.Tensor, target: torch.Tensor, *, fresh: bool) -> None:
        """``fresh``: nobody needs ``elements`` afterwards, which fill their storage."""
        if self._swaps:
            elements = elements if fresh else elements.contiguous().clone()
            elements.untyped_storage().byteswap(elements.dtype)
        if target.dtype == elements.dtype and not target.is_conj() and not target.is_neg():
            elements, target = as_bits(elements), as_bits(target)
        target.copy_(elements)

    def _read(self, record: int, offset: int, destination: memoryview) -> None:
        self.payloads.archive.read_range(record, offset, destination)
        self._count(record, destination.nbytes)

    def _inflate(self, record: int) -> torch.UntypedStorage:
        known = self._inflated
        if known is not None and known[0] == record:
            return known[1]
        storage = self.payloads.archive.load_storages([record], verify=False, progress=None)[0]
        self._count(record, self._payloads.entries[record].stored_nbytes)
        if self._keeps_inflated:
            self._inflated = (record, storage)
        return storage

    def _count(self, record: int, nbytes: int) -> None:
        with self._count_lock:
            self.bytes_read += nbytes
            if record not in self._headers_read:
                self._headers_read.add(record)
                self.bytes_read += 30 + len(self._payloads.entries[record].name)


def _finished(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """With what is not in the bytes."""
    if like.is_conj() or like.is_neg():
        torch._utils.set_tensor_metadata(tensor, torch._utils.get_tensor_metadata(like))
    if isinstance(like, torch.nn.Parameter):
        return torch.nn.Parameter(tensor, requires_grad=like.requires_grad)
    return tensor.requires_grad_(like.requires_grad) if like.is_leaf else tensor
