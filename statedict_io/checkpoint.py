"""``open_checkpoint``: a checkpoint of which only what is asked for is read."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from .archives import Records, check_kind, opened
from .errors import CorruptCheckpointError, corrupt
from .reading.kinds import ZIP_START
from .reading.persistent_ids import StorageFeed
from .reading.refusals import refusal
from .strided_reads import fill, memory_of, span_of
from .tensor_names import flat_tensors
from .unpickling import DeferredTensor, ZipReader, can_defer, can_rebind, swaps_bytes, torch_load

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# What unpickling raises where a kind that is made of tensors, parameters among them, meets one that is deferred. Not
# OSError: the disk's, or the TimeoutError of a signal's handler.
_WANTS_A_TENSOR = (AttributeError, LookupError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError)

_CURE = (
    "pass weights_only=False (`statedict-io convert --trust`), or allow what it needs with "
    "torch.serialization.add_safe_globals"
)


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: torch.Size  #: in elements
    dtype: torch.dtype  #: as saved
    offset: int | None  #: of its first byte in the file; None where its bytes do not lie there as they are
    nbytes: int  #: of its elements


class Checkpoint(Mapping[str, torch.Tensor]):
    """A read-only mapping of names to tensors, see :func:`open_checkpoint`. May be read from several threads.

    ``ckpt[name]`` reads that tensor alone, anew each time, onto the CPU: two tensors that shared memory when they were
    saved do not share it here.
    """

    def __init__(self, path: Any, *, backend: str = "auto", weights_only: bool = True) -> None:
        self._weights_only = weights_only
        self._exit = contextlib.ExitStack()
        self._records: Records = self._exit.enter_context(opened(path, backend, random_access=True))
        try:
            check_kind(self._records)
            self._swap = swaps_bytes(self._records)
            self._tensors, self._others, self._hidden = self._named()
        except BaseException:
            self.close()
            raise

    def _named(self) -> tuple[dict[str, Any], list[str], list[str]]:
        try:
            outline = self._outline()
        except pickle.UnpicklingError as e:
            if not self._weights_only:
                raise
            raise refusal(self.path, e, _CURE) from None
        return flat_tensors(outline, (torch.Tensor, DeferredTensor))

    def _outline(self) -> Any:
        """What was saved, with placeholders for tensors."""
        self._lazy = True
        if can_defer():
            # Most names are never asked for, and a placeholder costs as much as the rest of opening.
            self._feed = _PlaceholderFeed(self._records)
            with contextlib.suppress(*_WANTS_A_TENSOR):
                return self._unpickle(self._feed, defers=True)
        self._feed = _PlaceholderFeed(self._records)
        try:
            return self._unpickle(self._feed)
        except (NotImplementedError, RuntimeError, ValueError, TypeError) as e:
            # Some kinds of tensors cannot be rebuilt without their data: quantized and nested ones, DTensor.
            if isinstance(e, CorruptCheckpointError):
                raise
            self._lazy = False
            return self._unpickle(_RealFeed(self._records))

    def _placeholder(self, name: str) -> torch.Tensor:
        """A tensor on the meta device with all that is known of ``name``; where kinds need their data, it itself."""
        found = self._tensors[name]
        return found.tensor() if isinstance(found, DeferredTensor) else found

    def __getitem__(self, name: str) -> torch.Tensor:
        """Reads one tensor, onto the CPU, with the strides that it was saved with.

        Raises:
            KeyError: there is none of that name.
            CorruptCheckpointError: the tensor reaches beyond its record, or the record is unsound. Checksums are not
                looked at here: :func:`verify`.
            OSError: the file cannot be read.
            ValueError: the checkpoint is closed.
        """
        found = self._placeholder(name)
        record = self._record_of(found)
        if record is None:
            return self._rebuilt(name)
        isize = found.element_size()
        begin = found.storage_offset() * isize
        nbytes = span_of(found.shape, found.stride()) * isize
        entry = self._records.entries[record]
        if entry.compressed or (begin == 0 and nbytes == entry.nbytes):
            storage = self._archive().load_storages([record], verify=False, progress=None)[0]
            offset = found.storage_offset()
        else:
            part = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            self._archive().read_range(record, begin, memory_of(part))
            storage, offset = part.untyped_storage(), 0
        if self._swap:
            storage.byteswap(found.dtype)
        tensor = torch.empty(0, dtype=found.dtype, device="cpu").set_(storage, offset, found.shape, found.stride())
        return self._finished(tensor, found)

    def get_slice(self, name: str) -> TensorSlice:
        """``ckpt.get_slice(name)[a:b, c:d]`` reads what it returns, and at most as much again.

        Takes integers, slices with steps, ``...`` and ``None``.

        Raises:
            KeyError: there is no tensor of that name. What indexing raises is :class:`IndexError` where the tensor
                would, and :class:`TypeError` for an index that makes no view, such as a list or a mask.
        """
        return TensorSlice(self, name, self._placeholder(name))

    def info(self, name: str) -> TensorInfo:
        """What is known of a tensor; no data is read.

        Raises:
            KeyError: there is none of that name.
        """
        found = self._placeholder(name)
        record = self._record_of(found)
        offset = None
        if record is not None and not self._records.entries[record].compressed:
            offset = self._archive().payload_offset(record) + found.storage_offset() * found.element_size()
        # What a strided nested tensor has instead of a shape is its data.
        shape = torch.Size([found.size(0)]) if found.is_nested else found.shape
        return TensorInfo(shape, found.dtype, offset, found.numel() * found.element_size())

    def blocks(self, name: str, max_nbytes: int) -> Iterator[torch.Tensor]:
        """The tensor's elements in row-major order, in pieces; see :meth:`record` for which tensors."""
        record = self._record_of(self._placeholder(name))
        assert record is not None
        pending = [self._placeholder(name).detach()]
        whole = None
        if self._records.entries[record].compressed:
            whole = self[name].detach()  # cannot be read in part
            pending = [whole]
        while pending:
            view = pending.pop()
            if view.numel() * view.element_size() <= max_nbytes:
                yield view if whole is not None else self._read_view(name, view)
            elif view.is_contiguous() and view.dim() > 1:
                pending.append(view.view(-1))
            elif view.shape[0] == 1:
                pending.append(view[0])
            else:
                half = view.shape[0] // 2
                pending += [view[half:], view[:half]]

    @property
    def others(self) -> list[str]:
        """Names of the values that are not tensors."""
        return list(self._others)

    @property
    def hidden(self) -> list[str]:
        """A sentence for each tensor of the file that has no name here: another is spelled alike, or it is in an object
        that is no mapping, list or tuple."""
        return list(self._hidden)

    @property
    def path(self) -> str:
        """As given to :func:`open_checkpoint`."""
        return self._records.path

    @property
    def file_nbytes(self) -> int:
        return self._records.file_nbytes

    def record(self, name: str) -> str | None:
        """The record that a tensor's bytes are in; None where they are in several or in none."""
        index = self._record_of(self._placeholder(name))
        return None if index is None else self._records.entries[index].name

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path!r}: {len(self)} tensors>"

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; what was read stays valid."""
        self._closed = True
        self._exit.close()

    _closed = False

    def _archive(self) -> Any:
        if self._closed:
            raise ValueError(f"{self.path}: the checkpoint is closed")
        return self._records.archive

    def _unpickle(self, feed: StorageFeed, *, defers: bool = False) -> Any:
        reader = ZipReader(
            self._records,
            feed,
            lean_pickle=self._records.lean_pickle,
            assume_own_byteorder=True,
            in_place=True,
            defers=defers,
        )
        if not can_rebind():
            raise corrupt(self.path, f"torch {torch.__version__} cannot be made to read it lazily")
        with io.BytesIO(ZIP_START) as file:  # all that torch looks at before it asks the reader
            return torch_load(lambda _: contextlib.nullcontext(reader))(
                file, "cpu", weights_only=self._weights_only, mmap=False
            )

    def _record_of(self, tensor: torch.Tensor) -> int | None:
        """The one record that a plain tensor lies in."""
        if not self._lazy or type(tensor) not in _PLAIN:
            return None
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            return None
        record = self._feed.records.get(tensor.untyped_storage()._cdata)
        if record is not None and tensor.numel():
            end = (tensor.storage_offset() + span_of(tensor.shape, tensor.stride())) * tensor.element_size()
            entry = self._records.entries[record]
            if end > entry.nbytes:
                raise corrupt(
                    self.path, f"a tensor reaches to byte {end} of record {entry.name!r}, which has {entry.nbytes}"
                )
        return record

    def _rebuilt(self, name: str) -> torch.Tensor:
        """A tensor of a kind that consists of several storages, or is made with its data."""
        if not self._lazy:
            return self._placeholder(name)
        found = self._placeholder(name)
        if type(found) in _PLAIN and found.is_meta and not self._feed.records:
            return found
        plain = {self._record_of(self._placeholder(other)) for other in self._tensors}
        again, _, _ = flat_tensors(self._unpickle(_RealFeed(self._records, placeholders=plain)), (torch.Tensor,))
        return again[name]

    def _read_view(self, name: str, view: torch.Tensor) -> torch.Tensor:
        """``view``: of the tensor's placeholder."""
        record = self._record_of(self._placeholder(name))
        assert record is not None
        out = torch.empty(view.shape, dtype=view.dtype, device="cpu")
        archive = self._archive()
        if self._records.entries[record].compressed:
            storage = archive.load_storages([record], verify=False, progress=None)[0]
            whole = torch.empty(0, dtype=view.dtype, device="cpu")
            out.copy_(whole.set_(storage, view.storage_offset(), view.shape, view.stride()))
        else:
            read = functools.partial(archive.read_range, record)
            fill(_bits(out), view.storage_offset(), view.stride(), read, self._records.cheap_nbytes)
        if self._swap:
            out.untyped_storage().byteswap(out.dtype)
        return self._finished(out, view)

    def _finished(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """With what is not in the bytes."""
        if like.is_conj() or like.is_neg():
            torch._utils.set_tensor_metadata(tensor, torch._utils.get_tensor_metadata(like))
        if isinstance(like, torch.nn.Parameter):
            return torch.nn.Parameter(tensor, requires_grad=like.requires_grad)
        return tensor.requires_grad_(like.requires_grad) if like.is_leaf else tensor


class TensorSlice:
    """What ``Checkpoint.get_slice`` returns; index it."""

    def __init__(self, checkpoint: Checkpoint, name: str, placeholder: torch.Tensor) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self._placeholder = placeholder

    @property
    def shape(self) -> torch.Size:
        return self._placeholder.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._placeholder.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """A contiguous tensor, of its own memory.

        Raises:
            IndexError: as the tensor would.
            TypeError: for an index that makes no view, such as a list or a mask.
        """
        parts = index if isinstance(index, tuple) else (index,)
        for part in parts:
            if not (part is None or part is Ellipsis or isinstance(part, slice) or _is_integer(part)):
                raise TypeError(f"get_slice takes integers, slices, ... and None, not {type(part).__name__}")
        if self._checkpoint._record_of(self._placeholder) is None:
            return self._checkpoint[self._name][index].clone()
        return self._checkpoint._read_view(self._name, self._placeholder.detach()[index])


def open_checkpoint(path: Any, *, backend: str = "auto", weights_only: bool = True) -> Checkpoint:
    """Opens a file of ``torch.save`` as a mapping of flat names to tensors, reading nothing but the names.

    Nested mappings, lists and tuples are named by dotted path, nothing is escaped: ``{"model": {"w": t}}`` has
    ``model.w``. Where two are spelled alike a literal dotted key wins. Values that are no tensors are not in it.

    What is in ``data.pkl`` is unpickled once by torch's restricted unpickler, without any tensor's data. Plain tensors
    are then read alone. Sparse tensors and tensor subclasses are rebuilt by reading them together with all others of
    their kind; a file with quantized or nested tensors or DTensors is read in full here.

    Args:
        path: of a file in torch's zip format, also one that was zipped again; or a URL of fsspec (``str``), of which
            only the ranges that are needed are requested.
        backend: ``"auto"``, ``"native"`` or ``"torch"``, as for :func:`load`.
        weights_only: unpickle with torch's restricted unpickler: the security boundary. Open with ``False`` only what
            you trust.

    Returns:
        A mapping that holds the file open, and a context manager that closes it.

    Raises:
        OSError: the file cannot be read.
        CorruptCheckpointError: it is no sound archive.
        FileKindError: it is of another kind, such as torch's legacy format.
        pickle.UnpicklingError: it holds what torch's restricted unpickler refuses.

    Example:
        >>> sio.save({"model": {"w": torch.arange(6.0).reshape(3, 2)}}, "checkpoint.pt")
        >>> with sio.open_checkpoint("checkpoint.pt") as ckpt:
        ...     list(ckpt), ckpt.info("model.w").nbytes, ckpt.get_slice("model.w")[1:, 0]
        (['model.w'], 24, tensor([2., 4.]))
    """
    return Checkpoint(path, backend=backend, weights_only=weights_only)


class _PlaceholderFeed:
    """Storages without data, and the records that they stand for."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._storages: dict[str, torch.UntypedStorage] = {}
        self.records: dict[int, int] = {}  #: by address of the storage, which lives as long as this

    def take(self, name: str, nbytes: int) -> torch.UntypedStorage:
        known = self._storages.get(name)
        if known is not None and known.nbytes() == nbytes:
            return known
        index = self._records.sized(name, nbytes)
        storage = self._storages[name] = torch.UntypedStorage(nbytes, device="meta")
        self.records[storage._cdata] = index
        return storage


class _RealFeed:
    """Storages read when they are asked for, those of ``placeholders`` excepted."""

    def __init__(self, records: Records, placeholders: set[int | None] = frozenset()) -> None:  # type: ignore[assignment]
        self._records = records
        self._placeholders = placeholders

    def take(self, name: str, nbytes: int) -> torch.UntypedStorage:
        index = self._records.sized(name, nbytes)
        if index in self._placeholders:
            return torch.UntypedStorage(nbytes, device="meta")
        return self._records.archive.load_storages([index], verify=False, progress=None)[0]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as integers: copies of some dtypes are not supported, or not bit by bit."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    return tensor.view(integers[tensor.element_size()]) if tensor.numel() else tensor


def _is_integer(part: Any) -> bool:
    return hasattr(part, "__index__") and not isinstance(part, (bool, torch.Tensor, os.PathLike))
