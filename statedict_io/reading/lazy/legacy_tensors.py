"""The tensors in a file in torch's legacy format, and in the tar archives before that."""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.serialization

from ...archive.payload_ranges import RangeEntries
from ...installed import stock
from ...pickles.hash_bounds import check_pickle
from ...pickles.persistent_ids import with_persistent_ids
from ...pickles.protocol_2 import in_protocol_2
from ...pickles.refusals import refusal
from ...pickles.sparse_validation import forget_placeholders
from ...progress import ProgressCallback
from .. import legacy_file
from ..legacy_file import StoredStorage
from ..opened_bytes import OpenedBytes
from ..payloads import payloads_in
from .lazy_file import LazyFile
from .object_tensors import CURE, ObjectTensors
from .outlines import WANTS_DATA
from .placeholders import is_plain
from .stored_tensors import StoredTensors

_MAX_NUMEL = 1 << 63


class _NeedsData(Exception):
    """Storages that are parts of others, as torch before 0.4 wrote them."""


class _Storages:
    """Placeholders for storages, by what the object says of them: what an unpickler asks for persistent ids."""

    def __init__(self, take: Callable[[str, int], torch.UntypedStorage] | None = None) -> None:
        self._take = take
        self.by_key: dict[str, torch.UntypedStorage] = {}
        self.said: dict[str, StoredStorage] = {}
        self._keys: dict[int, str] = {}  # by address of the storage, which lives as long as this

    def load(self, saved_id: Any) -> Any:
        """``persistent_load``, as of ``torch.serialization._legacy_load``."""
        kind = torch.serialization._maybe_decode_ascii(saved_id[0])
        if kind == "module":
            return saved_id[1]
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        storage_type, key, _, numel, view = saved_id[1:]
        if view is not None:
            raise _NeedsData
        dtype = legacy_file.dtype_of(storage_type)
        if type(numel) is not int or not 0 <= numel < _MAX_NUMEL or type(key) is not str:
            raise pickle.UnpicklingError("a storage without a size or key")
        itemsize = torch._utils._element_size(dtype)
        said = StoredStorage(numel * itemsize, itemsize)
        if self.said.setdefault(key, said).nbytes != said.nbytes:
            raise pickle.UnpicklingError(f"storage {key!r} has two sizes")
        storage = self.by_key.get(key)
        if storage is None:
            if self._take is None:
                storage = torch.UntypedStorage(said.nbytes, device="meta")
            else:
                storage = self._take(key, said.nbytes)
            self.by_key[key] = storage
            self._keys[storage._cdata] = key
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

    def key_of(self, tensor: torch.Tensor) -> str | None:
        return self._keys.get(tensor.untyped_storage()._cdata) if is_plain(tensor) else None


class LegacyTensors(ObjectTensors):
    """See :class:`~.named_tensors.NamedTensors`. What cannot be made without data is loaded as a whole, by torch."""

    def __init__(self, opened: OpenedBytes, *, weights_only: bool, close: Callable[[], None]) -> None:
        self._opened = opened
        self._weights_only = weights_only
        self._file = legacy_file.parse(opened)
        if weights_only:
            check_pickle(self._file.object_pickle, opened.name)
        self._whole: Any = None
        try:
            self._storages, root = self._outlined()
            entries = legacy_file.entries(opened, self._file, self._storages.said)
        except (_NeedsData, *WANTS_DATA):
            entries = RangeEntries([], [])
            root = self._whole = _loaded(opened, weights_only)
        except pickle.UnpicklingError as e:
            if not weights_only:
                raise
            raise refusal(opened.name, e, CURE) from None
        stored = StoredTensors(payloads_in(opened, entries), swaps=sys.byteorder == "big")
        self._indices = {key: index for index, key in enumerate(self._file.keys)}
        super().__init__(stored, root, close=close)

    def _outlined(self) -> tuple[_Storages, Any]:
        if not self._weights_only:
            return self._unpickled(pickle)
        restricted = torch._weights_only_unpickler
        found: tuple[_Storages, Any]

        def unpickle(*, sets_aside: bool = False) -> Any:
            nonlocal found
            found = self._unpickled(restricted, sets_aside=sets_aside)
            return found[1]

        LazyFile.unpickle_most(unpickle)
        return found

    def _unpickled(
        self,
        pickle_module: Any,
        *,
        sets_aside: bool = False,
        take: Callable[[str, int], torch.UntypedStorage] | None = None,
    ) -> tuple[_Storages, Any]:
        storages = _Storages(take)
        stream = self._file.object_pickle
        is_restricted = pickle_module is not pickle
        module = with_persistent_ids(pickle_module, sets_aside=sets_aside)
        file = io.BytesIO(in_protocol_2(stream) if is_restricted else stream)
        unpickler = module.Unpickler(file, persistent_ids=storages, encoding="utf-8")
        if not is_restricted:
            unpickler.persistent_load = None  # bound to ours
        try:
            return storages, unpickler.load()
        finally:
            forget_placeholders()

    def made_on(self, take: Callable[[str, int], torch.UntypedStorage]) -> Any:
        if self._whole is not None:
            return self._whole
        pickle_module = torch._weights_only_unpickler if self._weights_only else pickle
        return self._unpickled(pickle_module, take=take)[1]

    def _record_of(self, placeholder: torch.Tensor) -> int | None:
        if self._whole is not None:
            return None
        key = self._storages.key_of(placeholder)
        if key is None:
            return None
        self._stored.check(self._indices[key], placeholder)
        return self._indices[key]

    def _rebuilt(self, name: str) -> torch.Tensor:
        found = self.placeholder(name)
        if self._whole is not None:
            return found
        tensors, _, _ = self.flat(_loaded(self._opened, self._weights_only))
        return tensors[name]

    def facts(self) -> dict[str, Any]:
        return {"kind": "torch, legacy", "storages": len(self._file.keys), "checksums": "none"}

    def check(self, progress: ProgressCallback | None = None) -> None:
        """There are no checksums."""


class TarTensors(ObjectTensors):
    """See :class:`~.named_tensors.NamedTensors`. All is loaded when it is opened, by torch, which reads these only with
    Python's own unpickler."""

    def __init__(self, opened: OpenedBytes, *, weights_only: bool, close: Callable[[], None]) -> None:
        legacy_file.tar_members(opened)
        if weights_only:
            raise pickle.UnpicklingError(
                f"{opened.name}: is a tar archive of torch, which torch's restricted unpickler does not read; if you "
                "trust the file, pass weights_only=False (`statedict-io convert --trust`)"
            )
        self._root = root = _loaded(opened, weights_only)
        super().__init__(StoredTensors(payloads_in(opened, RangeEntries([], []))), root, close=close)

    def _record_of(self, placeholder: torch.Tensor) -> int | None:
        del placeholder
        return None

    def _rebuilt(self, name: str) -> torch.Tensor:
        return self.placeholder(name)

    def made_on(self, take: Callable[[str, int], torch.UntypedStorage]) -> Any:
        return self._root

    def facts(self) -> dict[str, Any]:
        return {"kind": "torch, tar", "checksums": "none"}

    def check(self, progress: ProgressCallback | None = None) -> None:
        """There are no checksums."""


def _loaded(opened: OpenedBytes, weights_only: bool) -> Any:
    """By torch, on the CPU."""
    # torch reads a tar archive only from a file with a descriptor of its own.
    if opened.descriptor is not None:
        with os.fdopen(os.dup(opened.descriptor), "rb") as file:
            file.seek(0)
            return stock.torch_load(file, "cpu", weights_only=weights_only)
    with opened.stream() as stream:
        return stock.torch_load(stream, "cpu", weights_only=weights_only)
