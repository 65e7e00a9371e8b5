"""``data.pkl`` and storages as an object again: the installed ``torch.load``, with another reader behind it.

Nothing here unpickles. :func:`torch_load` runs the code of ``torch.serialization.load`` itself, with the names that
open and unpickle an archive bound to ours for this one call: no module is patched, so other threads and other callers
of torch are not concerned. The unpickler is torch's (its restricted one with ``weights_only``); what is ours is where
its storages come from.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import operator
import os
import sys
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.serialization
from torch.utils._python_dispatch import _disable_current_modes

from .backends.protocol import LeanPickle, TensorCall


class StorageFeed(Protocol):
    """Where the storages come from; names are those of records, such as ``data/0``."""

    def take(self, name: str, nbytes: int) -> torch.UntypedStorage:
        """The storage of a record, which must have ``nbytes``.

        Raises:
            CorruptCheckpointError: there is no such record, or it has another size.
        """


class SmallRecords(Protocol):
    """An archive as far as ``torch.serialization._load`` looks into it, the storages apart."""

    def names(self) -> list[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def read(self, name: str) -> bytes: ...

    def payload_offset(self, name: str) -> int: ...

    def header_offset(self, name: str) -> int: ...


class ZipReader:
    """Stands in for ``torch._C.PyTorchFileReader``."""

    def __init__(
        self,
        records: SmallRecords,
        feed: StorageFeed,
        *,
        lean_pickle: Callable[[bytes], LeanPickle] = LeanPickle.unchanged,
        assume_own_byteorder: bool = False,
        in_place: bool = False,
        defers: bool = False,
    ) -> None:
        self._records = records
        self.feed = feed
        self._lean_pickle = lean_pickle
        self._assume_own_byteorder = assume_own_byteorder
        self.in_place = in_place  #: storages stay where the feed puts them, whatever their location says
        self.defers = defers  #: what the lean pickle has taken out becomes a DeferredTensor each
        #: set where the unpickler takes long over each step, and understands what stands for a call
        self.abridges = False
        self.calls: Sequence[TensorCall] = []

    def has_record(self, name: str) -> bool:
        return name in self._records or (self._assume_own_byteorder and name == "byteorder")

    def get_record(self, name: str) -> bytes:
        if self._assume_own_byteorder and name == "byteorder":
            return sys.byteorder.encode()
        data = self._records.read(name)
        if self.abridges and name == "data.pkl":
            lean = self._lean_pickle(data)
            if {call.storage_type for call in lean.calls} <= _storage_types().keys():
                data, self.calls = lean
        return data

    def get_storage_from_record(self, name: str, nbytes: int, _: object) -> _Handed:
        return _Handed(self.feed.take(name, _nbytes(nbytes)))

    def get_record_offset(self, name: str) -> int:
        return self._records.payload_offset(name)

    def get_record_header_offset(self, name: str) -> int:
        return self._records.header_offset(name)

    def get_record_offset_no_read(self, cursor: int, name: str, nbytes: int, alignment: int) -> int:
        del alignment  # what torch computes from it is true of its own files only
        _nbytes(nbytes)
        return self._records.payload_offset(name) if name in self._records else cursor  # nobody looks, in torch

    def get_all_records(self) -> list[str]:
        return self._records.names()

    def serialization_id(self) -> str:
        name = ".data/serialization_id"
        return self._records.read(name).decode(errors="replace") if name in self._records else ""


def _nbytes(claimed: Any) -> int:
    """A forged pickle may say anything; torch takes an unsigned 64-bit number."""
    nbytes = operator.index(claimed)
    if not 0 <= nbytes < 1 << 64:
        raise TypeError(f"not a number of bytes: {nbytes}")
    return nbytes


class _Handed:
    """A storage in the wrapping in which ``PyTorchFileReader.get_storage_from_record`` returns it."""

    __slots__ = ("_untyped_storage",)

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._untyped_storage = storage

    def _typed_storage(self) -> _Handed:
        return self


class DeferredTensor:
    """Stands for a plain tensor in what was unpickled, until somebody asks for the tensor.

    It can be put into containers and does nothing else that a tensor does: whatever needs a tensor while unpickling
    fails. :meth:`tensor` may be called from several threads.
    """

    __slots__ = ("_call", "_make", "_tensor")
    __hash__ = None  # type: ignore[assignment]  # a dictionary's key or a set's element would be named by it

    def __init__(self, call: TensorCall, make: Callable[[TensorCall], torch.Tensor]) -> None:
        self._call = call
        self._make = make
        self._tensor: torch.Tensor | None = None

    def tensor(self) -> torch.Tensor:
        """The same one each time, whatever modes the caller is in."""
        with _deferred_making:
            if self._tensor is None:
                with _disable_current_modes(), torch.inference_mode(False):
                    self._tensor = self._make(self._call)
            return self._tensor


_deferred_making = threading.RLock()


def _start_anew() -> None:
    """In a forked child: another thread of its parent may hold the lock for ever."""
    global _deferred_making
    _deferred_making = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def can_defer() -> bool:
    """Whether nothing but torch's own functions sees what is unpickled. Functions that the user has allowed may ask
    whether it is a tensor, and do without."""
    user_globals = getattr(torch._weights_only_unpickler, "_get_user_allowed_globals", None)
    return user_globals is not None and all(name.startswith("torch.") for name in user_globals())


#: called with the opened file; what it returns is a ZipReader or torch's own reader, in a context manager
OpenReader = Callable[[Any], contextlib.AbstractContextManager[Any]]


def can_rebind() -> bool:
    """Whether the installed ``torch.load`` has the parts that :func:`torch_load` exchanges."""
    load = torch.serialization.load
    return (
        isinstance(load, types.FunctionType)
        and load.__closure__ is None
        and {"_open_zipfile_reader", "_load"} <= set(load.__code__.co_names)
    )


def torch_load(open_reader: OpenReader, after: Callable[[], None] = lambda: None) -> Callable[..., Any]:
    """``torch.load`` whose archives are opened by ``open_reader``; to be called directly, once, by the function that
    the user called: its warnings point there.

    ``after`` runs when an archive read through a :class:`ZipReader` has been unpickled, before it is closed.
    """
    module = vars(torch.serialization)
    torch_unpickle = module["_load"]

    def unpickle(zip_file: Any, map_location: Any, pickle_module: Any, **options: Any) -> Any:
        if not isinstance(zip_file, ZipReader):
            return torch_unpickle(zip_file, map_location, pickle_module, **options)
        with _collector_paused:
            result = torch_unpickle(zip_file, map_location, _quick(pickle_module, zip_file, map_location), **options)
        after()
        return result

    names = {
        **module,
        "_open_zipfile_reader": open_reader,
        "_load": unpickle,
        "warnings": _WarningsAbove,
        # Where Python keeps what it has warned of already.
        "__warningregistry__": module.setdefault("__warningregistry__", {}),
    }
    load = torch.serialization.load
    rebound = types.FunctionType(load.__code__, names, load.__name__, load.__defaults__)
    rebound.__kwdefaults__ = load.__kwdefaults__
    return rebound


class _CollectorPause:
    """No cyclic garbage collection while somebody unpickles: nothing that is being built is garbage, and the collector
    would go through all of it again and again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._was_enabled = False

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0 and self._was_enabled:
                gc.enable()


_collector_paused = _CollectorPause()


class _WarningsAbove:
    """``warnings``, for code that is called one frame deeper than it thinks."""

    @staticmethod
    def warn(message: Any, category: Any = None, stacklevel: int = 1, **options: Any) -> None:
        # This function is a frame too; what should point above torch.load should point above its caller.
        warnings.warn(message, category, stacklevel=stacklevel + (1 if stacklevel == 1 else 2), **options)


def _quick(pickle_module: Any, zip_file: ZipReader, map_location: Any) -> Any:
    """``pickle_module`` for ``_load``, whose unpickler resolves references to plain CPU storages without the detours
    that ``_load`` makes for every one of them; all others as before."""
    restricted = pickle_module is torch._weights_only_unpickler
    # Whatever its location: map_location sends it to the CPU. str() of any device of theirs is their own.
    in_place = zip_file.in_place or (isinstance(map_location, (str, torch.device)) and str(map_location) == "cpu")
    direct = (
        (in_place or map_location is None)
        and torch.serialization._package_registry[0][1] is torch.serialization._cpu_tag
        and _own_byteorder(zip_file)
    )
    if not (direct or restricted):
        return pickle_module
    take = zip_file.feed.take
    make_typed = torch.storage.TypedStorage
    untyped = torch.UntypedStorage
    storage_types = _storage_types()
    # What the unpickler calls for these globals.
    allowed = torch._weights_only_unpickler._get_allowed_globals()
    rebuild = _without_fake_tensors(allowed["torch._utils._rebuild_tensor_v2"])
    no_hooks = allowed["collections.OrderedDict"]
    element_sizes: dict[torch.dtype, int] = {}
    loaded: dict[str, Any] = {}

    def persistent_load_by(torch_persistent_load: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def make(call: TensorCall) -> torch.Tensor:
            kind, key, location, numel, *rest = call
            storage = persistent_load(("storage", storage_types[kind], key, location, numel))
            return rebuild(storage, *rest, no_hooks())

        # Not where a storage takes torch's own way: that one ends with the load.
        make_or_defer = functools.partial(DeferredTensor, make=make) if zip_file.defers and direct else make

        def persistent_load(saved_id: Any) -> Any:
            if type(saved_id) is int and zip_file.calls:
                return make_or_defer(zip_file.calls[saved_id])
            if type(saved_id) is not tuple or len(saved_id) != 5 or saved_id[0] != "storage":
                return torch_persistent_load(saved_id)
            _, storage_type, key, location, numel = saved_id
            if type(key) is not str:
                return torch_persistent_load(saved_id)
            dtype = torch.uint8 if storage_type is untyped else storage_type.dtype
            known = loaded.get(key)
            if known is not None:
                return known
            if direct and (in_place or location == "cpu") and type(numel) is int and type(dtype) is torch.dtype:
                size = element_sizes.get(dtype)
                if size is None:
                    size = element_sizes[dtype] = torch._utils._element_size(dtype)
                typed = make_typed(wrap_storage=take(f"data/{key}", numel * size), dtype=dtype, _internal=True)
                has_data = numel != 0
            else:
                typed = torch_persistent_load(saved_id)
                has_data = typed._data_ptr() != 0
            if has_data:  # those without are made anew each time, by torch too
                loaded[key] = typed
            return typed

        return persistent_load

    if restricted:
        zip_file.abridges = True
        return types.SimpleNamespace(Unpickler=_restricted_unpickler(persistent_load_by))

    class Unpickler(pickle_module.Unpickler):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, persistent_load_by(value) if name == "persistent_load" else value)

    return types.SimpleNamespace(Unpickler=Unpickler)


def _without_fake_tensors(rebuild: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``torch._utils._rebuild_tensor_v2`` that does not ask for each tensor, at a third of its cost, whether a mode for
    fake tensors is on."""
    in_fake_mode = torch._guards.detect_fake_mode(None) is not None
    if in_fake_mode or not isinstance(rebuild, types.FunctionType) or rebuild.__closure__ is not None:
        return rebuild
    names = {**rebuild.__globals__, "_restore_device_fake_mode": lambda tensor: tensor}
    return types.FunctionType(rebuild.__code__, names, rebuild.__name__, rebuild.__defaults__)


@functools.cache
def _storage_types() -> dict[str, Any]:
    """By "module name", what the restricted unpickler takes for the storage types that it allows."""
    allowed = torch._weights_only_unpickler._get_allowed_globals()
    kinds = [*torch._storage_classes, torch.UntypedStorage]
    names = [(kind.__module__, kind.__name__) for kind in kinds if kind is not torch.storage.TypedStorage]
    return {f"{module} {name}": allowed[f"{module}.{name}"] for module, name in names if f"{module}.{name}" in allowed}


def _restricted_unpickler(persistent_load_by: Callable[[Any], Any]) -> Any:
    """torch's, in Python, sets other attributes all the time: ``__setattr__`` would slow it down."""

    class Unpickler(torch._weights_only_unpickler.Unpickler):  # type: ignore[misc]
        @property
        def persistent_load(self) -> Callable[[Any], Any]:
            return self.quick_persistent_load

        @persistent_load.setter
        def persistent_load(self, value: Any) -> None:
            self.quick_persistent_load = persistent_load_by(value)

    return Unpickler


def _own_byteorder(zip_file: ZipReader) -> bool:
    """As ``torch.serialization._load`` finds it."""
    if zip_file.has_record("byteorder"):
        return zip_file.get_record("byteorder") == sys.byteorder.encode()
    return _byteorder_without_record() == sys.byteorder


def swaps_bytes(records: SmallRecords) -> bool:
    """Whether the storages have the other byte order than this machine."""
    recorded = records.read("byteorder").decode() if "byteorder" in records else _byteorder_without_record()
    if recorded not in ("little", "big"):
        raise ValueError(f"Unknown endianness type: {recorded}")  # as torch.load
    return recorded != sys.byteorder


def _byteorder_without_record() -> str:
    """Of files that do not say: torch before 2.1 wrote none."""
    endianness = torch.serialization.get_default_load_endianness()
    kinds = torch.serialization.LoadEndianness
    if endianness == kinds.NATIVE:
        return sys.byteorder
    return "big" if endianness == kinds.BIG else "little"
