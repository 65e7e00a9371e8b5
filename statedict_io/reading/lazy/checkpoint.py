"""``open_checkpoint``: a checkpoint of which only what is asked for is read.

What is known of the tensors comes from an outline of the file (:mod:`.outlines`), made once; data is read when it is
asked for.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from ...errors import StateDictIOError
from ...names.tensor_names import HiddenTensors, OtherNames, flat_tensors
from ...options import check_flags
from ...pickles.refusals import refusal
from ...pickles.set_aside import Refused
from ...pickles.unpickling import DeferredTensor
from ...untrusted.on_demand import OnDemand
from ..records import StoredRecords
from .lazy_file import LazyFile
from .outlines import WANTS_DATA, Outline
from .placeholders import DataFeed, is_saved_without_data, lacks_data

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
        check_flags(weights_only=weights_only)
        self._weights_only = weights_only
        self._file = LazyFile(path, backend=backend, random_access=True, max_overhead=2, keeps_inflated=False)
        try:
            self._tensors, self._others, self._hidden = self._named()
        except BaseException:
            self.close()
            raise
        refused = [name for name, value in self._tensors.items() if isinstance(value, Refused)]
        self._refused = {name: self._tensors.pop(name).names for name in refused}

    def _named(self) -> tuple[dict[str, Any], OtherNames, HiddenTensors]:
        try:
            self._outline = Outline(self._file, weights_only=self._weights_only)
        except pickle.UnpicklingError as e:
            if not self._weights_only:
                raise
            raise refusal(self.path, e, _CURE) from None
        return self._flat(self._outline.root)

    def _flat(self, root: Any) -> tuple[dict[str, Any], OtherNames, HiddenTensors]:
        try:
            return flat_tensors(root, (torch.Tensor, DeferredTensor, Refused), self.records.file_nbytes)
        except StateDictIOError as e:
            raise StateDictIOError(f"{self.path}: {e}") from None

    def _placeholder(self, name: str) -> torch.Tensor:
        """A tensor on the meta device with all that is known of ``name``; where kinds need their data, it itself."""
        found = self._tensors.get(name)
        if found is None:
            self._refuse(name)
            raise KeyError(name)
        return found.tensor() if isinstance(found, DeferredTensor) else found

    def _refuse(self, name: object) -> None:
        """Raises where ``name`` is in something that was refused."""
        for refused, names in self._refused.items():
            if name == refused or (isinstance(name, str) and name.startswith(f"{refused}.")):
                raise KeyError(
                    f"{refused!r} needs {', '.join(names)}, which torch's restricted unpickler refuses; if you trust "
                    f"{self.path}, {_CURE}"
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        """Reads one tensor, onto the CPU, with the strides that it was saved with.

        Raises:
            KeyError: there is no tensor of that name, or it is one of :attr:`refused`.
            CorruptCheckpointError: the tensor reaches beyond its record, or the record is unsound. Checksums are not
                compared here: :func:`verify` does that.
            OSError: the file cannot be read.
            ValueError: the checkpoint is closed.
        """
        found = self._placeholder(name)
        return self._rebuilt(name) if self._record_of(found) is None else self._file.tensor(found)

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
            KeyError: there is no tensor of that name.
        """
        found = self._placeholder(name)
        offset = self._file.offset_of(found) if self._outline.is_lazy else None
        # What a strided nested tensor has instead of a shape is its data.
        shape = torch.Size([found.size(0)]) if found.is_nested else found.shape
        return TensorInfo(shape, found.dtype, offset, found.numel() * found.element_size())

    def blocks(self, name: str, max_nbytes: int) -> Iterator[torch.Tensor]:
        """The tensor's elements in row-major order, in pieces; see :meth:`record` for which tensors."""
        placeholder = self._placeholder(name)
        pending = [placeholder.detach()]
        whole = None
        if self._file.is_compressed(placeholder):
            whole = self[name].detach()  # cannot be read in part
            pending = [whole]
        while pending:
            view = pending.pop()
            if view.numel() * view.element_size() <= max_nbytes:
                yield view if whole is not None else self._file.view(view)
            elif view.is_contiguous() and view.dim() > 1:
                pending.append(view.view(-1))
            elif view.shape[0] == 1:
                pending.append(view[0])
            else:
                half = view.shape[0] // 2
                pending += [view[half:], view[:half]]

    @property
    def others(self) -> Sequence[str]:
        """Names of the values that are not tensors, without those in :attr:`refused`. Found when they are asked for."""
        return self._counted(self._others)

    @property
    def hidden(self) -> Sequence[str]:
        """One sentence for each tensor of the file that has no name here, because another one has the same name or
        because it is in an object that is not a mapping, list or tuple. Found when they are asked for.

        Raises:
            StateDictIOError: the objects have many more parts than a file of that size needs.
        """
        return self._counted(self._hidden)

    def _counted(self, found: OnDemand[str]) -> OnDemand[str]:
        """``found``, after it has shown that it ends; errors name the file."""
        try:
            len(found)
        except StateDictIOError as e:
            raise StateDictIOError(f"{self.path}: {e}") from None
        return found

    @property
    def refused(self) -> dict[str, tuple[str, ...]]:
        """Names of the values that torch's restricted unpickler refuses, and for each the classes and functions, with
        their modules, that it does not allow. Tensors may be in them."""
        return dict(self._refused)

    @property
    def path(self) -> str:
        """As given to :func:`open_checkpoint`."""
        return self._file.path

    @property
    def records(self) -> StoredRecords:
        """Of the open file."""
        return self._file.records

    def record(self, name: str) -> str | None:
        """The record that a tensor's bytes are in; None if they are in several records or in none."""
        index = self._record_of(self._placeholder(name))
        return None if index is None else self._file.records.entries[index].name

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
        self._file.close()

    def _record_of(self, tensor: torch.Tensor) -> int | None:
        """The one record that a plain tensor lies in."""
        return self._file.record_of(tensor) if self._outline.is_lazy else None

    def _rebuilt(self, name: str) -> torch.Tensor:
        """A tensor of a kind that consists of several storages, or is made with its data."""
        found = self._placeholder(name)
        if not self._outline.is_lazy or is_saved_without_data(found):
            return found
        # Most of a file are plain tensors: their records are left out if that can be.
        of_plain = {self._record_of(self._placeholder(other)) for other in self._tensors} - {None}
        if of_plain:
            with contextlib.suppress(*WANTS_DATA):
                again = self._with_data(name, without_data=of_plain)
                if not lacks_data(again):
                    return again
        # Parts of it lie in such records, too, or there are none.
        return self._with_data(name)

    def _with_data(self, name: str, without_data: Collection[int | None] = ()) -> torch.Tensor:
        """The tensor of that name in a structure that is made with data, except for that of some records."""
        feed = DataFeed(self._file.records, without_data)
        again, _, _ = self._flat(self._outline.made_with(feed))
        return again[name]


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
        """A tensor of its own memory; contiguous, but for one that was saved with its elements on top of each other, as
        ``expand`` leaves them: they stay so.

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
        return self._checkpoint._file.view(self._placeholder.detach()[index])


def open_checkpoint(path: Any, *, backend: str = "auto", weights_only: bool = True) -> Checkpoint:
    """Opens a file of ``torch.save`` as a mapping of flat names to tensors, reading nothing but the names.

    Nested mappings, lists and tuples are named by dotted path, nothing is escaped: ``{"model": {"w": t}}`` has
    ``model.w``. If two would get the same name, a literal dotted key wins. Values that are not tensors are not in it.

    What is in ``data.pkl`` is unpickled once by torch's restricted unpickler, without any tensor's data. Plain tensors
    are then read alone. Sparse tensors and tensor subclasses are rebuilt by reading them together with all others of
    their kind; a file with quantized or nested tensors or DTensors is read in full here.

    Args:
        path: of a file in torch's zip format, also one that was zipped again; or a URL of fsspec (``str``), of which
            only the ranges that are needed are requested.
        backend: ``"auto"``, ``"native"`` or ``"python"``, as for :func:`load`.
        weights_only: unpickle with torch's restricted unpickler: the security boundary. Open with ``False`` only what
            you trust.

    Returns:
        A mapping that holds the file open, and a context manager that closes it.

    Raises:
        OSError: the file cannot be read.
        CorruptCheckpointError: it is not a sound archive.
        FileKindError: it is of another kind, such as torch's legacy format.
        pickle.UnpicklingError: torch's restricted unpickler refuses all of it. Where it refuses single values, the
            rest is there, and they are in ``Checkpoint.refused``.
        TypeError: an option is of a wrong type; names it.

    Example:
        >>> sio.save({"model": {"w": torch.arange(6.0).reshape(3, 2)}}, "checkpoint.pt")
        >>> with sio.open_checkpoint("checkpoint.pt") as ckpt:
        ...     list(ckpt), ckpt.info("model.w").nbytes, ckpt.get_slice("model.w")[1:, 0]
        (['model.w'], 24, tensor([2., 4.]))
    """
    return Checkpoint(path, backend=backend, weights_only=weights_only)


def _is_integer(part: Any) -> bool:
    return hasattr(part, "__index__") and not isinstance(part, (bool, torch.Tensor, os.PathLike))
