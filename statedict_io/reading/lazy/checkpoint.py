"""``open_checkpoint``: a checkpoint of which only what is asked for is read.

What is known of the tensors comes from an outline of the file (:mod:`.outlines`), made once; data is read when it is
asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from ...options import check_flags
from ...progress import ProgressCallback
from .named_tensors import NamedTensors, StoredObject
from .opening import open_tensors


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: torch.Size  #: in elements
    dtype: torch.dtype  #: as saved
    offset: int | None  #: of its first byte in the file; None where its bytes do not lie there as they are
    nbytes: int  #: of its elements
    path: str = field(default="", compare=False)  #: of the file that it is in: for a folder one of the shards


class Checkpoint(Mapping[str, torch.Tensor]):
    """A read-only mapping of names to tensors, see :func:`open_checkpoint`. May be read from several threads.

    ``ckpt[name]`` reads that tensor alone, anew each time, onto the CPU: two tensors that shared memory when they were
    saved do not share it here.
    """

    def __init__(self, path: Any, *, backend: str = "auto", weights_only: bool = True) -> None:
        check_flags(weights_only=weights_only)
        self._tensors = open_tensors(path, backend=backend, weights_only=weights_only)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Reads one tensor, onto the CPU, with the strides that it was saved with.

        Raises:
            KeyError: there is no tensor of that name, or it is one of :attr:`refused`.
            CorruptCheckpointError: the tensor reaches beyond its record, or the record is unsound. Checksums are not
                compared here: :func:`verify` does that.
            OSError: the file cannot be read.
            ValueError: the checkpoint is closed.
        """
        return self._tensors.tensor(name)

    def get_slice(self, name: str) -> TensorSlice:
        """``ckpt.get_slice(name)[a:b, c:d]`` reads what it returns, and at most as much again.

        Takes integers, slices with steps, ``...`` and ``None``.

        Raises:
            KeyError: there is no tensor of that name. What indexing raises is :class:`IndexError` where the tensor
                would, and :class:`TypeError` for an index that makes no view, such as a list or a mask.
        """
        return TensorSlice(self._tensors, name)

    def info(self, name: str) -> TensorInfo:
        """What is known of a tensor; no data is read.

        Raises:
            KeyError: there is no tensor of that name.
        """
        found = self._tensors.placeholder(name)
        place = self._tensors.place(name)
        # What a strided nested tensor has instead of a shape is its data.
        shape = torch.Size([found.size(0)]) if found.is_nested else found.shape
        return TensorInfo(shape, found.dtype, place.offset, found.numel() * found.element_size(), place.path)

    def blocks(self, name: str, max_nbytes: int) -> Iterator[torch.Tensor]:
        """The elements of a plain tensor with data in row-major order, in pieces."""
        pending = [self._tensors.placeholder(name).detach()]
        whole = None
        if self._tensors.is_read_whole(name) or not self._tensors.has_views(name):
            whole = self[name].detach()
            pending = [whole]
        while pending:
            view = pending.pop()
            if view.numel() * view.element_size() <= max_nbytes:
                yield view if whole is not None else self._tensors.view(name, view)
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
        return self._tensors.others

    @property
    def hidden(self) -> Sequence[str]:
        """One sentence for each tensor of the file that has no name here, because another one has the same name or
        because it is in an object that is not a mapping, list or tuple. Found when they are asked for.

        Raises:
            StateDictIOError: the objects have many more parts than a file of that size needs.
        """
        return self._tensors.hidden

    @property
    def refused(self) -> dict[str, tuple[str, ...]]:
        """Names of what cannot be had here, and for each what it needs. That is either classes and functions, with
        their modules, that torch's restricted unpickler does not allow (tensors may be in such a value), or a dtype
        that this torch lacks."""
        return dict(self._tensors.refused)

    @property
    def metadata(self) -> dict[str, str]:
        """Of a safetensors file, or of the shards and their index; empty for other kinds."""
        return dict(self._tensors.metadata)

    @property
    def path(self) -> str:
        """As given to :func:`open_checkpoint`; of a folder that of the file that was found in it."""
        return self._tensors.path

    @property
    def stored_object(self) -> StoredObject | None:
        """What was saved, where that is any object, of which the tensors are parts, and not named tensors alone."""
        return self._tensors.stored_object

    @property
    def nbytes(self) -> int:
        """Of the file, or of all shards."""
        return self._tensors.nbytes

    def record(self, name: str) -> str | None:
        """The record that a tensor's bytes are in; None if they are in several records or in none. In a safetensors
        file each tensor is a record, of its own name."""
        return self._tensors.place(name).record

    def is_plain(self, name: str) -> bool:
        """Whether a tensor is plain, and has data: neither sparse, quantized, nested nor a subclass, nor on the meta
        device when it was saved."""
        return self._tensors.is_plain(name)

    def is_read_whole(self, name: str) -> bool:
        """Whether any part of a tensor takes reading all of it, as where its record is compressed."""
        return self._tensors.is_read_whole(name)

    def other_values(self) -> Iterator[tuple[str, Any]]:
        """:attr:`others`, with the values."""
        return self._tensors.other_values()

    def facts(self) -> dict[str, Any]:
        """About the format, for people."""
        return self._tensors.facts()

    def check(self, progress: ProgressCallback | None = None) -> None:
        """Compares all checksums that there are.

        Raises:
            CorruptCheckpointError: one does not match; names the record and its tensors.
        """
        self._tensors.check(progress)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors.names()  # a mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors.names())

    def __len__(self) -> int:
        return len(self._tensors.names())

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
        self._tensors.close()


class TensorSlice:
    """What ``Checkpoint.get_slice`` returns; index it."""

    def __init__(self, tensors: NamedTensors, name: str) -> None:
        self._tensors = tensors
        self._name = name
        self._placeholder = tensors.placeholder(name)

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
        if not self._tensors.has_views(self._name):
            return self._tensors.tensor(self._name)[index].clone()
        return self._tensors.view(self._name, self._placeholder.detach()[index])


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
