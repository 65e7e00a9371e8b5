"""What the persistent ids in ``data.pkl`` stand for: storages, and in a lean pickle whole tensors."""

from __future__ import annotations

import functools
import io
import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.serialization

from ..installed import stock
from ..installed.proofs import in_clean_thread
from .lean_pickle import TensorCall
from .set_aside import SetsAside

#: makes what :meth:`PersistentIds.load` returns for a tensor call, given what makes the tensor
Defer = Callable[[TensorCall, Callable[[TensorCall], torch.Tensor]], Any]


class StorageFeed(Protocol):
    """Where the storages come from; names are those of records, such as ``data/0``."""

    def take(self, name: str, nbytes: int) -> torch.UntypedStorage:
        """The storage of a record, which must have ``nbytes``.

        Raises:
            CorruptCheckpointError: there is no such record, or it has another size.
        """


class TensorSource(Protocol):
    """What :class:`PersistentIds` needs of an archive's reader."""

    feed: StorageFeed
    calls: Sequence[TensorCall]  #: for which ids that are numbers stand; set when ``data.pkl`` has been read
    defers: bool  #: whether ``defer`` is to be used; known then too


class PersistentIds:
    """Resolves the persistent ids of one ``data.pkl``: references to plain CPU storages without the detours that
    ``torch.serialization._load`` makes for every one of them, all others by torch.

    Every storage of a load is held here. So nothing that this refers to may refer back to it: what has been loaded
    would then wait for Python's cyclic collector.

    Args:
        source: of the storages. It may not refer to this.
        direct: storages saved from the CPU are to stay where the source puts them, with the bytes that it reads.
        in_place: those saved from anywhere else are too.
        defer: tensors of tensor calls are left to it.
    """

    def __init__(
        self,
        source: TensorSource,
        *,
        direct: bool,
        in_place: bool,
        defer: Defer | None = None,
    ) -> None:
        allowed = torch._weights_only_unpickler._get_allowed_globals()
        self._source = source
        self._take = source.feed.take
        self._direct = direct
        self._in_place = in_place
        self._defer = defer
        # What the unpickler calls for these globals.
        self._rebuild = _without_fake_tensors(allowed["torch._utils._rebuild_tensor_v2"])
        self._no_hooks = allowed["collections.OrderedDict"]
        self._storage_types = storage_types()
        # Before 2.15 torch makes those without data anew for each tensor.
        self._shares_empty = _shares_storages_without_data()
        self._loaded: dict[str, Any] = {}
        self.stock_persistent_load: Callable[[Any], Any] = _unset  #: ``_load``'s own ``persistent_load``

    def load(self, saved_id: Any) -> Any:
        """``persistent_load`` of an unpickler."""
        if type(saved_id) is int and self._source.calls:
            call = self._source.calls[saved_id]
            if self._defer is None or not self._source.defers:
                return self._tensor(call)
            return self._defer(call, self._tensor)
        if type(saved_id) is not tuple or len(saved_id) != 5 or saved_id[0] != "storage":
            return self.stock_persistent_load(saved_id)
        _, storage_type, key, location, numel = saved_id
        if type(key) is not str:
            return self.stock_persistent_load(saved_id)
        return self._storage(storage_type, key, location, numel)

    def _tensor(self, call: TensorCall) -> torch.Tensor:
        kind, key, location, numel, *rest = call
        storage = self._storage(self._storage_types[kind], key, location, numel)
        return self._rebuild(storage, *rest, self._no_hooks())

    def _storage(self, storage_type: Any, key: str, location: Any, numel: Any) -> Any:
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
        known = self._loaded.get(key)
        if known is not None and (known.dtype == dtype or not self._shares_empty):
            return known
        if known is not None and type(numel) is int and known._untyped_storage.nbytes() == numel * _element_size(dtype):
            # Of a record without data: others are of one dtype.
            return torch.storage.TypedStorage(wrap_storage=known._untyped_storage, dtype=dtype, _internal=True)
        if self._direct and (self._in_place or location == "cpu") and type(numel) is int and type(dtype) is torch.dtype:
            untyped = self._take(f"data/{key}", numel * _element_size(dtype))
            typed = torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
            has_data = numel != 0
        else:
            typed = self.stock_persistent_load(("storage", storage_type, key, location, numel))
            has_data = typed._data_ptr() != 0
        if has_data or self._shares_empty:
            self._loaded.setdefault(key, typed)
        return typed


@functools.cache
def _shares_storages_without_data() -> bool:
    """Of the installed torch, tried out on a sample."""

    def shares() -> bool:
        file = io.BytesIO()
        empty = torch.empty(0, device="cpu")
        stock.torch_save([empty, empty.view(0, 2)], file)
        file.seek(0)
        first, second = stock.torch_load(file, weights_only=True)
        return bool(first.untyped_storage()._cdata == second.untyped_storage()._cdata)

    return in_clean_thread(shares)


def with_persistent_ids(pickle_module: Any, *, sets_aside: bool = False) -> Any:
    """``pickle_module`` as far as ``_load`` uses it. Its ``Unpickler`` takes :class:`PersistentIds` as a further
    keyword argument, ``persistent_ids``, and asks them for what its ids stand for.

    ``sets_aside``: torch's restricted one gives :class:`~statedict_io.pickles.set_aside.Refused` for what it refuses.
    """
    if pickle_module is torch._weights_only_unpickler:
        return types.SimpleNamespace(Unpickler=_SettingAsideUnpickler if sets_aside else _RestrictedUnpickler)
    # ``_load`` derives a class of its own for each call too. What a call holds is held by instances alone: a class is
    # part of a cycle.
    unpickler = type("Unpickler", (_AsksPersistentIds, pickle_module.Unpickler), {})
    return types.SimpleNamespace(Unpickler=unpickler)


class _AsksPersistentIds:
    """For an unpickler written in C or by the user. ``_load`` assigns its ``persistent_load`` to the instance."""

    _persistent_ids: PersistentIds

    def __init__(self, file: Any, *, persistent_ids: PersistentIds, **options: Any) -> None:
        super().__init__(file, **options)  # type: ignore[call-arg]
        self._persistent_ids = persistent_ids

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "persistent_load":
            self._persistent_ids.stock_persistent_load = value
            value = self._persistent_ids.load
        super().__setattr__(name, value)


# Without it :mod:`~statedict_io.reading.loading`'s proof fails, and torch loads by itself.
_Unpickler: Any = getattr(getattr(torch, "_weights_only_unpickler", None), "Unpickler", object)


class _RestrictedUnpickler(_Unpickler):  # type: ignore[misc]
    """torch's is Python, and sets attributes all the time: ``__setattr__`` would slow it down."""

    def __init__(self, file: Any, *, persistent_ids: PersistentIds, **options: Any) -> None:
        super().__init__(file, **options)
        self._persistent_ids = persistent_ids

    @property
    def persistent_load(self) -> Callable[[Any], Any]:
        return self._persistent_ids.load

    @persistent_load.setter
    def persistent_load(self, value: Any) -> None:
        self._persistent_ids.stock_persistent_load = value


class _SettingAsideUnpickler(SetsAside, _RestrictedUnpickler):
    pass


@functools.cache
def storage_types() -> dict[str, Any]:
    """By "module name", what the restricted unpickler takes for the storage types that it allows."""
    allowed = torch._weights_only_unpickler._get_allowed_globals()
    kinds = [*torch._storage_classes, torch.UntypedStorage]
    names = [(kind.__module__, kind.__name__) for kind in kinds if kind is not torch.storage.TypedStorage]
    return {f"{module} {name}": allowed[f"{module}.{name}"] for module, name in names if f"{module}.{name}" in allowed}


@functools.cache
def _element_size(dtype: torch.dtype) -> int:
    return torch._utils._element_size(dtype)


def _without_fake_tensors(rebuild: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``torch._utils._rebuild_tensor_v2`` that does not ask for each tensor, at a third of its cost, whether a mode for
    fake tensors is on."""
    in_fake_mode = torch._guards.detect_fake_mode(None) is not None
    if in_fake_mode or not isinstance(rebuild, types.FunctionType) or rebuild.__closure__ is not None:
        return rebuild
    names = {**rebuild.__globals__, "_restore_device_fake_mode": lambda tensor: tensor}
    return types.FunctionType(rebuild.__code__, names, rebuild.__name__, rebuild.__defaults__)


def _unset(saved_id: Any) -> Any:
    raise RuntimeError(f"persistent id {saved_id!r} before torch has set what loads it")
