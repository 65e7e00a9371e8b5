"""The gathered state's nested structure, and its ``data.pkl`` without its tensors.

A :class:`TensorEntry` stands for a tensor that no process holds as a whole. It is pickled as the installed torch would
pickle the contiguous CPU tensor that gathering makes of it.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.serialization

from ..errors import StateDictIOError
from ..installed.proofs import DCP_STRUCTURE, proof
from ..pickles.pickling import PythonStorageTable, pickle_object, reference_to
from .strips import row_major_strides


class TensorEntry:
    """A contiguous CPU tensor of which nothing but this is known. ``key`` is set when it is first pickled."""

    __slots__ = ("_storage", "dtype", "requires_grad", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, *, requires_grad: bool = False) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self.requires_grad = requires_grad
        self._storage = _StorageEntry(self)

    @property
    def nbytes(self) -> int:
        nbytes = self.dtype.itemsize
        for size in self.shape:
            nbytes *= size
        return nbytes

    @property
    def key(self) -> int:
        """N of the record ``data/N``."""
        assert self._storage.key is not None, "not pickled yet"
        return self._storage.key

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduction = _reduction(self.dtype)
        strides = tuple(row_major_strides(self.shape, 1))
        shape = tuple([*self.shape])  # an object of its own: a tuple met twice is pickled as a reference
        arguments = (self._storage, 0, shape, strides, self.requires_grad, OrderedDict(), *reduction.arguments)
        return reduction.rebuild, arguments


class _StorageEntry:
    __slots__ = ("key", "tensor")

    def __init__(self, tensor: TensorEntry) -> None:
        self.tensor = tensor
        self.key: int | None = None


class _Reduction(NamedTuple):
    rebuild: Callable[..., Any]
    arguments: tuple[Any, ...]  #: those after the six that every tensor has
    storage_type: Any
    counts_bytes: bool  #: whether the stream says how many bytes the storage has, not how many elements


@functools.cache
def _reduction(dtype: torch.dtype) -> _Reduction:
    """How the installed torch pickles a tensor of ``dtype``, asked of it with a small one."""
    sample = torch.empty(2, dtype=dtype, device="cpu")
    rebuild, arguments = torch.Tensor.__reduce_ex__(sample, 2)
    storage = arguments[0]
    if isinstance(storage, torch.storage.TypedStorage):
        return _Reduction(rebuild, arguments[6:], getattr(torch, storage._pickle_storage_type()), False)
    return _Reduction(rebuild, arguments[6:], torch.serialization.normalize_storage_type(type(storage)), True)


class PickledStructure(NamedTuple):
    data_pkl: bytes
    entries: list[TensorEntry]  #: in the order of their keys
    storages: list[torch.UntypedStorage]  #: of tensors inside opaque values; their keys follow those of the entries


def pickle_structure(state: Any, entries: list[TensorEntry] | None = None) -> PickledStructure:
    """``data.pkl`` of a state with entries in place of tensors.

    Args:
        state: what ``torch.save`` takes, each entry in it once.
        entries: those of an earlier call, which have their keys; None numbers all in the order in which they are met.
    """
    _check_reproduced()
    return _pickle(state, entries)


def _pickle(state: Any, entries: list[TensorEntry] | None) -> PickledStructure:
    numbered: list[TensorEntry] = [] if entries is None else entries
    table = PythonStorageTable()
    first_of_table = len(numbered)

    def persistent_id(obj: Any) -> tuple[Any, ...] | None:
        if type(obj) is _StorageEntry:
            if obj.key is None:
                obj.key = len(numbered)
                numbered.append(obj.tensor)
            _, _, storage_type, counts_bytes = _reduction(obj.tensor.dtype)
            numel = obj.tensor.nbytes // (1 if counts_bytes else obj.tensor.dtype.itemsize)
            return ("storage", storage_type, str(obj.key), "cpu", numel)
        found = reference_to(table, obj)
        if found is None:
            return None
        word, storage_type, key, _, numel = found
        return (word, storage_type, str(int(key) + first_of_table), "cpu", numel)

    class StructurePickler(pickle.Pickler):
        pass

    stream = io.BytesIO()
    pickler = StructurePickler(stream, protocol=torch.serialization.DEFAULT_PROTOCOL)
    setattr(pickler, "persistent_id", persistent_id)  # noqa: B010 - the C slot, not the method
    pickler.dump(state)
    return PickledStructure(stream.getvalue(), numbered, table.storages)


def _check_reproduced() -> None:
    verdict = _reproduced()
    if verdict.shortage is not None:
        raise MemoryError(f"whether torch's format is written could not be tried out: {verdict.shortage}")
    if not verdict:
        raise StateDictIOError(
            f"torch {torch.__version__} pickles tensors in a way that SingleFileWriter does not know; "
            "save with FileSystemWriter, or with the torch that this statedict_io was released for"
        )


@proof(DCP_STRUCTURE)
def _reproduced() -> bool:
    """Whether entries are pickled as the installed torch pickles tensors: on a sample."""
    dtypes = [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.uint16]
    shapes = [(), (3,), (2, 0, 4), (4, 5)]

    def sample(make: Callable[..., Any]) -> dict[str, Any]:
        tensors = [make(shape, dtype=dtype) for shape in shapes for dtype in dtypes]
        return {"tensors": {str(i): tensor for i, tensor in enumerate(tensors)}, "lr": [0.5, None]}

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu")

    theirs = pickle_object(sample(empty), pickle, torch.serialization.DEFAULT_PROTOCOL)
    return _pickle(sample(TensorEntry), None).data_pkl == theirs.data_pkl
