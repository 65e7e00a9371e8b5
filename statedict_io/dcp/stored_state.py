"""A file of ``torch.save`` as DCP's loading sees it: flat names and their values."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import StateDictIOError
from ..installed import torch_save
from ..reading.lazy.lazy_file import LazyFile
from ..reading.refusals import refusal
from ..remote.stores import is_url, locate
from .flat_state import FlatState, flat_state


class StoredState:
    """An open file and the state in it, with placeholders for tensors. No payload is read until it is asked for.

    Use from one thread; :meth:`close` it.

    Args:
        path: of the file.
        weights_only: unpickle with torch's restricted unpickler.
        backend: that reads the file.
        name: what errors call the file, where not by its path.

    Raises:
        OSError, CorruptCheckpointError, StateDictIOError: the file cannot be read, is damaged, or holds no mapping.
        ValueError: a URL that is not this machine's.
        Exception: what ``torch.load`` raises for what it will not unpickle.
    """

    def __init__(self, path: str, *, weights_only: bool, backend: str, name: str | None = None) -> None:
        if is_url(path):
            place = locate(path)
            if place.local_path is None:
                raise ValueError(
                    f"{place.url}: ranks read rows of a file, not of an object in a store: copy it to a file system "
                    "that all ranks share, or load it with statedict_io.load"
                )
            path = place.local_path
        self.file = LazyFile(path, backend=backend, random_access=False, max_overhead=1, keeps_inflated=True, name=name)
        try:
            state = self._unpickle(weights_only)
            if not isinstance(state, Mapping):
                raise StateDictIOError(
                    f"{self.file.path}: holds a {type(state).__name__}; DCP loads mappings of names to values"
                )
            #: as in FlatState
            self.values, self.paths, self.renamed = self._flat(state)
        except BaseException:
            self.close()
            raise

    def _unpickle(self, weights_only: bool) -> Any:
        try:
            return self.file.unpickle(weights_only=weights_only)
        except pickle.UnpicklingError as e:
            if not weights_only:
                raise
            raise refusal(self.file.path, e, "pass weights_only=False (on the command line --trust)") from None

    def _flat(self, state: Mapping[Any, Any]) -> FlatState:
        try:
            return flat_state(state)
        except StateDictIOError as e:
            raise StateDictIOError(f"{self.file.path}: {e}") from None

    def close(self) -> None:
        self.file.close()

    def is_plain(self, value: Any) -> bool:
        """Whether ``value`` is a tensor whose elements lie in a record as they are."""
        return self.file.is_plain(value) and not value.is_conj() and not value.is_neg()

    def has_like(self, other: StoredState, name: str) -> bool:
        """Whether what ``other`` has under a name can be planned for, and this be read."""
        if name not in self.values:
            return False
        ours, theirs = self.values[name], other.values[name]
        if not self.is_plain(ours):
            return not other.is_plain(theirs)
        return other.is_plain(theirs) and ours.shape == theirs.shape and ours.dtype == theirs.dtype

    def opaque(self, name: str) -> io.BytesIO:
        """What ``torch.save`` makes of a value, with the tensors in it read."""
        stream = io.BytesIO()
        torch_save(self._with_data(self.values[name]), stream)
        stream.seek(0)
        return stream

    def _with_data(self, value: Any) -> Any:
        """``value`` with tensors that have their data in place of the placeholders, wherever they are in it."""
        met: list[Any] = []

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: Any) -> int | None:
                if not isinstance(obj, torch.Tensor):
                    return None
                met.append(obj)
                return len(met) - 1

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, index: int) -> Any:
                return filled[index]

        stream = io.BytesIO()
        Pickler(stream).dump(value)
        if not met:
            return value
        filled = [self._filled(tensor) for tensor in met]
        stream.seek(0)
        return Unpickler(stream).load()

    def _filled(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.file.is_plain(tensor):
            raise StateDictIOError(
                f"{self.file.path}: holds a {type(tensor).__name__} of layout {tensor.layout}, which SingleFileReader "
                "cannot give out; load it with torch.load"
            )
        return self.file.tensor(tensor)
