"""A file of ``torch.save`` as DCP's loading sees it: flat names and their values."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import StateDictIOError
from ..installed.stock import torch_save
from ..pickles.refusals import refusal
from ..pickles.set_aside import Refused
from ..reading.lazy.lazy_file import LazyFile
from ..reading.opened_bytes import open_bytes
from ..untrusted.limits import shown
from .flattening import FlatState, flatten


class StoredState:
    """An open file and the state in it, with placeholders for tensors. No payload is read until it is asked for.

    Use from one thread; :meth:`close` it.

    Args:
        path: of the file; or a URL.
        weights_only: unpickle with torch's restricted unpickler.
        backend: that reads the file.
        name: what errors call the file, where not by its path.
        cure: what errors advise for a file that is trusted, where ``weights_only`` refuses something.

    Raises:
        OSError, CorruptCheckpointError, StateDictIOError: the file cannot be read, is damaged, or holds no mapping.
        ImportError, ValueError: a URL of a scheme that nothing here serves.
        pickle.UnpicklingError: the restricted unpickler refuses all of it. What it refuses of the values has names like
            others, and raises where it is asked for.
        Exception: what else ``torch.load`` raises for what it will not unpickle.
    """

    def __init__(
        self,
        path: str,
        *,
        weights_only: bool,
        backend: str,
        cure: str,
        name: str | None = None,
    ) -> None:
        self._cure = cure
        self._exit = contextlib.ExitStack()
        try:
            opened = self._exit.enter_context(open_bytes(path, backend, name=name))
            self.file = LazyFile(opened, max_overhead=1, keeps_inflated=True)
            self._exit.callback(self.file.close)
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
        if not weights_only:
            return self.file.unpickle(weights_only=False)
        try:
            return self.file.unpickle_most(self.file.unpickle)
        except pickle.UnpicklingError as e:
            raise refusal(self.file.path, e, self._cure) from None

    def _flat(self, state: Mapping[Any, Any]) -> FlatState:
        try:
            return flatten(state, self.file.nbytes)
        except StateDictIOError as e:
            raise StateDictIOError(f"{self.file.path}: {e}") from None

    def close(self) -> None:
        self._exit.close()

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

    def opaque_nbytes(self, name: str) -> int:
        """About how many bytes :meth:`opaque` will give.

        Raises:
            pickle.UnpicklingError: the restricted unpickler refuses some of the value.
            StateDictIOError: it is nested too deep to be pickled.
        """
        stream, met = self._pickled(name)
        # Others have no storage to ask; they are refused where they are filled.
        plain = [tensor for tensor in met if self.file.is_plain(tensor)]
        return stream.getbuffer().nbytes + sum(tensor.untyped_storage().nbytes() for tensor in plain)

    def opaque(self, name: str) -> io.BytesIO:
        """What ``torch.save`` makes of a value, with the tensors in it read.

        Raises:
            pickle.UnpicklingError, StateDictIOError: as :meth:`opaque_nbytes`.
        """
        stream = io.BytesIO()
        try:
            torch_save(self._with_data(name), stream)
        except RecursionError:
            raise self._too_deep(name) from None
        stream.seek(0)
        return stream

    def _with_data(self, name: str) -> Any:
        """A value with tensors that have their data in place of the placeholders, wherever they are in it."""
        stream, met = self._pickled(name)
        if not met:
            return self.values[name]
        filled = [self._filled(tensor) for tensor in met]

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, index: int) -> Any:
                return filled[index]

        return Unpickler(stream).load()

    def _pickled(self, name: str) -> tuple[io.BytesIO, list[torch.Tensor]]:
        """A pickle of the value with the numbers of the tensors that are in it, and these."""
        met: list[torch.Tensor] = []
        refused: list[Refused] = []

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: Any) -> int | None:
                if isinstance(obj, Refused):
                    refused.append(obj)
                    return -1
                if not isinstance(obj, torch.Tensor):
                    return None
                met.append(obj)
                return len(met) - 1

        stream = io.BytesIO()
        try:
            Pickler(stream).dump(self.values[name])
        except RecursionError:
            raise self._too_deep(name) from None
        if refused:
            needs = ", ".join(dict.fromkeys(needed for each in refused for needed in each.names))
            raise pickle.UnpicklingError(
                f"{self.file.path}: {name!r} needs {needs}, which torch's restricted unpickler refuses; if you trust "
                f"the file, {self._cure}"
            )
        stream.seek(0)
        return stream, met

    def _too_deep(self, name: str) -> StateDictIOError:
        return StateDictIOError(
            f"{self.file.path}: {shown(name)!r} is nested too deep to be pickled; load it with statedict_io.load"
        )

    def _filled(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.file.is_plain(tensor):
            raise StateDictIOError(
                f"{self.file.path}: holds a {type(tensor).__name__} of layout {tensor.layout}, which SingleFileReader "
                "cannot give out; load it with torch.load"
            )
        return self.file.tensor(tensor)
