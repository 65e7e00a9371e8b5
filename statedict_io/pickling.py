"""An object as ``data.pkl`` and the storages it refers to, by the rules of ``torch.serialization._save``."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
import torch.serialization


@dataclass(frozen=True)
class PickledObject:
    data_pkl: bytes
    #: in first-pickled order, which is the order of their keys. Held until written: a storage made by ``__reduce__`` has no other owner, and its
    #: address could be given to the next one.
    storages: list[torch.UntypedStorage]


def pickle_object(obj: Any, pickle_module: Any, pickle_protocol: int) -> PickledObject:
    """Pickles ``obj``, putting a reference in place of every storage.

    Args:
        obj: what ``torch.save`` takes.
        pickle_module: has a ``Pickler`` that can be subclassed (``pickle``, ``dill``, ``cloudpickle``).
        pickle_protocol: of the pickle stream.

    Raises:
        RuntimeError: where two tensors view the same bytes as different dtypes.
        Exception: whatever pickling ``obj`` raises.
    """
    storages: dict[str, torch.UntypedStorage] = {}
    keys: dict[int, str] = {}
    dtypes: dict[int, torch.dtype] = {}

    def reference(obj: Any) -> tuple[Any, ...] | None:
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
        if str(storage.device) != "meta" and storage.data_ptr() != 0:
            if dtypes.setdefault(storage.data_ptr(), dtype) != dtype:
                raise RuntimeError(
                    "Cannot save multiple tensors or storages that view the same data as different types"
                )
        key = keys.setdefault(storage._cdata, str(len(keys)))
        fake_device = getattr(obj, "_fake_device", None)
        location = torch.serialization.location_tag(storage) if fake_device is None else str(fake_device)
        storages[key] = storage
        return ("storage", storage_type, key, location, numel)

    class StoragePickler(pickle_module.Pickler):  # type: ignore[misc,name-defined]
        def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
            return reference(obj)

    stream = io.BytesIO()
    try:
        StoragePickler(stream, protocol=pickle_protocol).dump(obj)
    finally:
        del reference  # a class is garbage only to the cyclic collector; it must not keep the storages until then
    return PickledObject(stream.getvalue(), list(storages.values()))
