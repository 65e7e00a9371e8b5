"""An object as ``data.pkl`` and the storages it refers to, by the rules of ``torch.serialization._save``."""

from __future__ import annotations

import collections
import copyreg
import functools
import io
import pickle
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.serialization
from torch import Tensor
from torch.nn import Parameter

from ..installed.proofs import REDUCTION, proof

# Bound here, as what a save looks up in the large dictionaries of torch's modules is in no cache when it begins.
# A torch without one of them is one in which somebody always interferes.
_num_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_num_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_location_tags: list[Any] = getattr(torch.serialization, "_package_registry", [(0, None)])


class StorageTable(Protocol):
    """The storages met so far."""

    @property
    def storages(self) -> list[torch.UntypedStorage]:
        """In first-pickled order, which is the order of their keys."""

    def key_of(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> str:
        """The key of ``storage``, the next one if it is new.

        Raises:
            RuntimeError: where the same bytes were seen as another dtype.
        """


@dataclass(slots=True)  # as targets.FileTarget
class PickledObject:
    data_pkl: bytes
    #: Held until written: a storage made by ``__reduce__`` has no other owner, and its address could be given to the
    #: next one.
    table: StorageTable


class NativeTables(Protocol):
    """The extension: makes tables that also have ``persistent_id`` and ``reduce`` for the C pickler."""

    def __hash__(self) -> int: ...
    def TensorReduction(self, **names: Any) -> Any: ...
    def StorageTable(self, reduction: Any, reference: Callable[[Any], Any]) -> Any: ...


class PythonStorageTable:
    """See :class:`StorageTable`."""

    def __init__(self) -> None:
        self.storages: list[torch.UntypedStorage] = []
        self._keys: dict[int, str] = {}
        self._dtypes: dict[int, torch.dtype] = {}

    def key_of(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> str:
        address = 0 if str(storage.device) == "meta" else storage.data_ptr()
        if address != 0 and self._dtypes.setdefault(address, dtype) != dtype:
            raise RuntimeError("Cannot save multiple tensors or storages that view the same data as different types")
        key = self._keys.get(storage._cdata)
        if key is None:
            key = self._keys[storage._cdata] = str(len(self._keys))
            self.storages.append(storage)
        return key


def pickle_object(
    obj: Any, pickle_module: Any, pickle_protocol: int, native_tables: NativeTables | None = None
) -> PickledObject:
    """Pickles ``obj``, putting a reference in place of every storage.

    Args:
        obj: what ``torch.save`` takes.
        pickle_module: has a ``Pickler`` that can be subclassed (``pickle``, ``dill``, ``cloudpickle``).
        pickle_protocol: of the pickle stream.
        native_tables: reduces plain tensors without Python code, where nothing has been customised and it provably
            gives the same stream.

    Raises:
        RuntimeError: where two tensors view the same bytes as different dtypes.
        Exception: whatever pickling ``obj`` raises.
    """
    if native_tables is not None and _is_stock(pickle_module) and reduces_like_torch(native_tables):
        return _pickle_through_table(obj, pickle_protocol, native_tables)
    table = PythonStorageTable()

    class StoragePickler(pickle_module.Pickler):  # type: ignore[misc]
        # By attribute, not by closure: a class is garbage only to the cyclic collector, and must not keep the storages
        # until then.
        storage_table: StorageTable

        def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
            # Called for every object of the stream, some twenty a tensor.
            return None if type(obj) in _COMMON_TYPES else reference_to(self.storage_table, obj)

    stream = io.BytesIO()
    pickler = StoragePickler(stream, protocol=pickle_protocol)
    pickler.storage_table = table
    pickler.dump(obj)
    return PickledObject(stream.getvalue(), table)


#: of most objects that are no storages
_COMMON_TYPES = frozenset(
    (str, int, bool, tuple, dict, collections.OrderedDict, types.FunctionType, torch.Size, Tensor)
)


def reference_to(table: StorageTable, obj: Any) -> tuple[Any, ...] | None:
    """What stands for ``obj`` in the stream if it is a storage."""
    if isinstance(obj, torch.storage.TypedStorage):
        storage = obj._untyped_storage
        dtype = obj.dtype
        storage_type = getattr(torch, obj._pickle_storage_type())
        numel = obj._size()
    elif torch.is_storage(obj):
        storage = obj
        dtype = torch.uint8
        storage_type = torch.serialization.normalize_storage_type(type(obj))
        numel = storage.nbytes()
    else:
        return None
    key = table.key_of(storage, dtype)
    fake_device = getattr(obj, "_fake_device", None)
    location = torch.serialization.location_tag(storage) if fake_device is None else str(fake_device)
    return ("storage", storage_type, key, location, numel)


class _TablePickler(pickle.Pickler):
    """A subclass for its instance dictionary, where the C pickler finds ``reducer_override``."""


class _ReferenceThrough:
    """Calls :func:`reference_to` with ``table``, which holds this object: set to None, it ends the cycle."""

    table: Any = None

    def __call__(self, obj: Any) -> tuple[Any, ...] | None:
        return reference_to(self.table, obj)


def _pickle_through_table(obj: Any, pickle_protocol: int, native_tables: NativeTables) -> PickledObject:
    reduction = _reduction(
        native_tables,
        torch._utils._rebuild_tensor_v2,
        torch._utils._rebuild_parameter,
        torch.serialization.location_tag,
    )
    reference = _ReferenceThrough()
    reference.table = table = native_tables.StorageTable(reduction, reference)
    stream = io.BytesIO()
    pickler = _TablePickler(stream, protocol=pickle_protocol)
    setattr(pickler, "reducer_override", table.reduce)  # noqa: B010
    setattr(pickler, "persistent_id", table.persistent_id)  # noqa: B010 - the C slot, not the method
    try:
        pickler.dump(obj)
    finally:
        reference.table = None
    return PickledObject(stream.getvalue(), table)


@functools.lru_cache(maxsize=1)  # by the functions, which may be replaced
def _reduction(native_tables: NativeTables, rebuild_tensor: Any, rebuild_parameter: Any, location_tag: Any) -> Any:
    return native_tables.TensorReduction(
        tensor_type=Tensor,
        parameter_type=Parameter,
        ordered_dict=collections.OrderedDict,
        rebuild_tensor=rebuild_tensor,
        rebuild_parameter=rebuild_parameter,
        storage_types={d: getattr(torch, name) for d, name in torch.storage._dtype_to_storage_type_map().items()},
        location_tag=location_tag,
    )


def _reducers() -> tuple[Any, ...]:
    """What decides, by itself, how plain tensors are pickled."""
    return (
        pickle.Pickler,
        Tensor.__reduce_ex__,
        getattr(Tensor, "_reduce_ex_internal", None),
        Parameter.__reduce_ex__,
        _location_tags[0][1],
    )


# None where somebody interfered before this module was imported.
_STOCK_REDUCERS = (
    _reducers()
    if [getattr(reducer, "__module__", None) for reducer in _reducers()]
    == ["_pickle", "torch._tensor", "torch._tensor", "torch.nn.parameter", "torch.serialization"]
    else None
)


def _is_stock(pickle_module: Any) -> bool:
    """Whether plain tensors are pickled as torch does it when nobody interferes."""
    return (
        pickle_module is pickle
        and _reducers() == _STOCK_REDUCERS
        and Tensor not in copyreg.dispatch_table
        and Parameter not in copyreg.dispatch_table
        and not _num_function_modes()
        and not _num_dispatch_modes()
        and not torch.jit.is_tracing()  # sizes are tensors then, and so pickled
    )


@proof(REDUCTION)
def reduces_like_torch(native_tables: NativeTables) -> bool:
    """The proof that this torch's reduction is the one that ``native_tables`` knows."""
    tensor = torch.arange(24.0, device="cpu").reshape(2, 3, 4)
    with torch.enable_grad():
        parameter = Parameter(torch.ones(3, device="cpu"))
    sample = {
        "cpu": tensor,
        "view": tensor[:, 1:].mT,
        "scalar": tensor[0, 0, 0],
        "parameter": parameter,
        "storage": [tensor, 1.5, None],
    }
    return all(
        _pickle_through_table(sample, protocol, native_tables).data_pkl
        == pickle_object(sample, pickle, protocol).data_pkl
        for protocol in (2, pickle.HIGHEST_PROTOCOL)
    )
