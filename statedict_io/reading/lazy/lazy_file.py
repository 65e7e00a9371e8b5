"""One open file of ``torch.save``: its structure, and any part of any tensor in it."""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...errors import corrupt
from ...formats.kinds import ZIP_START
from ...pickles.hash_bounds import Gate
from ...pickles.persistent_ids import StorageFeed
from ...pickles.refusals import without_frames
from ...pickles.set_aside import Refused
from ...pickles.unpickling import ReadBy, ZipReader, can_rebind, load_through, swaps_bytes
from ..records import DATA_PKL, StoredRecords, check_kind, open_records
from .placeholders import PlaceholderFeed
from .strided_reads import Copy, as_bits, fill, memory_of, span_of

_SERIALIZATION_ID = ".data/serialization_id"
_MAX_ID_NBYTES = 4096


class FileVersion(NamedTuple):
    """Tells one content of a file from another; equal for copies of a file that says what its content is."""

    nbytes: int
    serialization_id: bytes | None  #: hashes names and checksums; None where the file has none, or no checksums
    mtime_ns: int | None  #: ns since the epoch; None where the serialization id says more


class LazyFile:
    """A file that is opened once: directory, pickle and payloads are those of one version of it, whatever takes its
    place meanwhile.

    Tensors of the unpickled structure are placeholders on the meta device; views of them say what is to be read.
    Reading may be done from several threads. :meth:`close` it.

    Args:
        path: of the file, or a URL.
        backend: ``"auto"``, ``"native"`` or ``"python"``, as for :func:`statedict_io.load`.
        random_access: little of the file will be read; tells the kernel not to read ahead.
        max_overhead: views are read with what lies between their elements if that is so many times their bytes at most;
            it saves system calls.
        keeps_inflated: keep the last compressed record that was read, for other parts of it.
        name: what errors call the file, where not by its path.

    Raises:
        OSError, CorruptCheckpointError, FileKindError: as :func:`~statedict_io.reading.records.opened`.
    """

    def __init__(
        self,
        path: Any,
        *,
        backend: str,
        random_access: bool,
        max_overhead: float,
        keeps_inflated: bool,
        name: str | None = None,
    ) -> None:
        self._exit = contextlib.ExitStack()
        self._records: StoredRecords = self._exit.enter_context(
            open_records(path, backend, random_access=random_access, name=name)
        )
        self._max_overhead = max_overhead
        self._keeps_inflated = keeps_inflated
        self._inflated: tuple[int, torch.UntypedStorage] | None = None
        self._headers_read: set[int] = set()
        self._count_lock = threading.Lock()
        self._closed = False
        self._placeholders = PlaceholderFeed(self._records)
        self._gate = Gate()
        try:
            check_kind(self._records)
            self._swaps = swaps_bytes(self._records)
        except BaseException:
            self.close()
            raise
        self.bytes_read = self._structure_nbytes()  #: of the file: directory, ``data.pkl``, headers and payloads

    @property
    def records(self) -> StoredRecords:
        """For what needs no tensors.

        Raises:
            ValueError: the file is closed.
        """
        if self._closed:
            raise ValueError(f"{self.path}: the checkpoint is closed")
        return self._records

    @property
    def path(self) -> str:
        """As given."""
        return self._records.path

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self._records.file_nbytes

    @functools.cached_property
    def version(self) -> FileVersion:
        """Which content of the file is open.

        Raises:
            CorruptCheckpointError, OSError: the record with the serialization id cannot be read.
        """
        records = self._records
        storages = records.storages()
        has_checksums = all(records.has_crc(index) for index in storages if records.entries[index].nbytes)
        if has_checksums and _SERIALIZATION_ID in records and records.entry(_SERIALIZATION_ID).nbytes <= _MAX_ID_NBYTES:
            return FileVersion(self.nbytes, records.read(_SERIALIZATION_ID), None)
        return FileVersion(self.nbytes, None, records.mtime_ns)

    def close(self) -> None:
        """What was read stays valid."""
        self._closed = True
        self._exit.close()

    def unpickle(
        self,
        *,
        weights_only: bool = True,
        sets_aside: bool = False,
        defers: bool = False,
        feed: StorageFeed | None = None,
    ) -> Any:
        """What was saved, with placeholders for tensors. Those of earlier calls are placeholders no more.

        Args:
            weights_only: with torch's restricted unpickler.
            sets_aside: what that refuses becomes a :class:`~statedict_io.pickles.set_aside.Refused`.
            defers: plain tensors become :class:`~statedict_io.pickles.unpickling.DeferredTensor`.
            feed: of storages that are no placeholders.

        Raises:
            Exception: what ``torch.load`` raises for what it will not unpickle.
        """
        if feed is None:
            feed = self._placeholders = PlaceholderFeed(self._records)
        reader = ZipReader(
            self.records,
            feed,
            lean_pickle=self._records.lean_pickle,
            assume_own_byteorder=True,
            in_place=True,
            placeholders=True,
            defers=defers,
            sets_aside=sets_aside,
            gate=self._gate,
        )
        if not can_rebind():
            raise corrupt(self.path, f"torch {torch.__version__} cannot be made to read it lazily")
        with io.BytesIO(ZIP_START) as file:  # all that torch looks at before it asks the reader
            load = load_through(ReadBy(reader))
            return load(file, "cpu", weights_only=weights_only, mmap=False)

    def unpickle_most(self, unpickle: Callable[..., Any]) -> Any:
        """What ``unpickle()`` gives, or ``unpickle(sets_aside=True)`` where something is refused.

        Raises:
            pickle.UnpicklingError: all of it is refused, or what is allowed cannot do without what is not.
        """
        refusal: BaseException
        try:
            return unpickle()
        except pickle.UnpicklingError as e:
            refusal = without_frames(e)
        found: Any = Refused(())
        try:
            found = unpickle(sets_aside=True)
        except (OSError, MemoryError):
            raise
        except Exception:  # whatever an object that can do nothing leads to
            pass
        if isinstance(found, Refused):
            raise refusal
        return found

    def is_plain(self, value: Any) -> bool:
        """Whether ``value`` is a tensor whose bytes lie in a record, element by element."""
        return isinstance(value, torch.Tensor) and self._placeholders.record_of(value) is not None

    def record_of(self, tensor: torch.Tensor) -> int | None:
        """The one record that a plain tensor lies in; None for other kinds.

        Raises:
            CorruptCheckpointError: the tensor reaches beyond it.
        """
        record = self._placeholders.record_of(tensor)
        if record is not None and tensor.numel():
            end = (tensor.storage_offset() + span_of(tensor.shape, tensor.stride())) * tensor.element_size()
            entry = self._records.entries[record]
            if end > entry.nbytes:
                raise corrupt(
                    self.path, f"a tensor reaches to byte {end} of record {entry.name!r}, which has {entry.nbytes}"
                )
        return record

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where a tensor's first byte is in the file; None where its bytes do not lie there as they are."""
        record = self.record_of(tensor)
        if record is None or self._records.entries[record].compressed:
            return None
        return self.records.archive.payload_offset(record) + tensor.storage_offset() * tensor.element_size()

    def is_compressed(self, tensor: torch.Tensor) -> bool:
        """Whether a plain tensor can be read only as a whole."""
        record = self._placeholders.record_of(tensor)
        return record is not None and self._records.entries[record].compressed

    def tensor(self, placeholder: torch.Tensor) -> torch.Tensor:
        """A plain tensor with its data, on the CPU, with the strides that it was saved with and memory of its own.

        Raises:
            CorruptCheckpointError: it reaches beyond its record, or the record is unsound.
            OSError: the file cannot be read.
        """
        record = self.record_of(placeholder)
        assert record is not None, "not plain"
        itemsize = placeholder.element_size()
        begin = placeholder.storage_offset() * itemsize
        nbytes = span_of(placeholder.shape, placeholder.stride()) * itemsize
        entry = self._records.entries[record]
        if entry.compressed or (begin == 0 and nbytes == entry.nbytes):
            storage = self.records.archive.load_storages([record], verify=False, progress=None)[0]
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

    def view(self, view: torch.Tensor) -> torch.Tensor:
        """A view of a placeholder of a plain tensor as a contiguous tensor on the CPU, or where its elements lie on top
        of each other as one that does too; raises as :meth:`tensor`."""
        span = span_of(view.shape, view.stride())
        if view.numel() > span:
            elements = torch.empty(span, dtype=view.dtype, device="cpu")
            self.read(view.detach().as_strided((span,), (1,)), elements)
            return _finished(elements.as_strided(view.shape, view.stride()), view)
        out = torch.empty(view.shape, dtype=view.dtype, device="cpu")
        self.read(view, out)
        return _finished(out, view)

    def read(self, view: torch.Tensor, target: torch.Tensor) -> None:
        """Fills a tensor with the elements of a view of a placeholder of a plain tensor, read straight into it where it
        is on the CPU, has the view's dtype and lies in the order of the file.

        Args:
            view: those that are conjugates or negatives give the elements as they are in the file.
            target: of the same shape, with any strides, dtype, device.

        Raises:
            CorruptCheckpointError, OSError: as :meth:`tensor`.
        """
        record = self.record_of(view)
        assert record is not None, "not plain"
        view, target = view.detach(), target.detach()
        if view.numel() == 0:
            return
        if self._records.entries[record].compressed:
            whole = torch.empty(0, dtype=view.dtype, device="cpu").set_(
                self._inflate(record), view.storage_offset(), view.shape, view.stride()
            )
            self._copy(whole, target, fresh=False)
        elif (
            not self._swaps
            and target.device.type == "cpu"
            and target.dtype == view.dtype
            and not target.is_conj()
            and not target.is_neg()
        ):
            self._fill(record, view, as_bits(target))
        else:
            self._fill(record, view, target, copy=functools.partial(self._copy, fresh=True))

    def _copy(self, elements: torch.Tensor, target: torch.Tensor, *, fresh: bool) -> None:
        """``fresh``: nobody needs ``elements`` afterwards, which fill their storage."""
        if self._swaps:
            elements = elements if fresh else elements.contiguous().clone()
            elements.untyped_storage().byteswap(elements.dtype)
        if target.dtype == elements.dtype and not target.is_conj() and not target.is_neg():
            elements, target = as_bits(elements), as_bits(target)
        target.copy_(elements)

    def _fill(self, record: int, view: torch.Tensor, target: torch.Tensor, copy: Copy | None = None) -> None:
        fill(
            target,
            view.storage_offset(),
            view.stride(),
            functools.partial(self._read, record),
            cheap_nbytes=self._records.cheap_nbytes,
            max_overhead=self._max_overhead,
            dtype=view.dtype if copy is not None else None,
            copy=copy,
        )

    def _read(self, record: int, offset: int, destination: memoryview, num_rows: int = 1, pitch: int = 0) -> None:
        self.records.archive.read_range(record, offset, destination, num_rows, pitch)
        self._count(record, destination.nbytes)

    def _inflate(self, record: int) -> torch.UntypedStorage:
        known = self._inflated
        if known is not None and known[0] == record:
            return known[1]
        storage = self.records.archive.load_storages([record], verify=False, progress=None)[0]
        self._count(record, self._records.entries[record].stored_nbytes)
        if self._keeps_inflated:
            self._inflated = (record, storage)
        return storage

    def _count(self, record: int, nbytes: int) -> None:
        with self._count_lock:
            self.bytes_read += nbytes
            if record not in self._headers_read:
                self._headers_read.add(record)
                self.bytes_read += 30 + len(self._records.entries[record].name)

    def _structure_nbytes(self) -> int:
        """Of the directory and ``data.pkl``."""
        entries = self._records.entries
        end = max((entry.header_offset + entry.stored_nbytes for entry in entries), default=0)
        return self.nbytes - end + (self._records.entry(DATA_PKL).stored_nbytes if DATA_PKL in self._records else 0)


def _finished(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """With what is not in the bytes."""
    if like.is_conj() or like.is_neg():
        torch._utils.set_tensor_metadata(tensor, torch._utils.get_tensor_metadata(like))
    if isinstance(like, torch.nn.Parameter):
        return torch.nn.Parameter(tensor, requires_grad=like.requires_grad)
    return tensor.requires_grad_(like.requires_grad) if like.is_leaf else tensor
