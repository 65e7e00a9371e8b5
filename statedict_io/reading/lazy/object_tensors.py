"""The tensors in an object that was unpickled, under dotted names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from ...errors import StateDictIOError
from ...names.tensor_names import HiddenTensors, OtherNames, flat_tensors
from ...pickles.set_aside import Refused
from ...pickles.unpickling import DeferredTensor
from ...untrusted.on_demand import OnDemand
from .named_tensors import Place
from .placeholders import is_plain
from .stored_tensors import StoredTensors
from .strided_reads import memory_of

CURE = (
    "pass weights_only=False (`statedict-io convert --trust`), or allow what it needs with "
    "torch.serialization.add_safe_globals"
)


class ObjectTensors:
    """What of :class:`~.named_tensors.NamedTensors` and :class:`~.named_tensors.StoredObject` follows from the object;
    to be derived from for what is left: ``facts``, ``check``, ``made_on`` and the two methods that come first here.

    Args:
        stored: reads the tensors that have placeholders.
        root: what was saved.
        close: closes the file.
    """

    def __init__(
        self,
        stored: StoredTensors,
        root: Any,
        *,
        close: Callable[[], None],
    ) -> None:
        self._stored = stored
        self._close = close
        self.metadata: dict[str, str] = {}
        self._tensors, self._others, self._hidden = self.flat(root)
        refused = [name for name, value in self._tensors.items() if isinstance(value, Refused)]
        self._refused = {name: self._tensors.pop(name).names for name in refused}

    def _record_of(self, placeholder: torch.Tensor) -> int | None:
        """The payload that all of a tensor of the object lies in, or would if it were not deferred; None for other
        kinds."""
        raise NotImplementedError

    def _rebuilt(self, name: str) -> torch.Tensor:
        """A tensor that consists of several storages, or is made with its data."""
        raise NotImplementedError

    def flat(self, root: Any) -> tuple[dict[str, Any], OtherNames, HiddenTensors]:
        try:
            return flat_tensors(root, (torch.Tensor, DeferredTensor, Refused), self.nbytes)
        except StateDictIOError as e:
            raise StateDictIOError(f"{self.path}: {e}") from None

    @property
    def path(self) -> str:
        return self._stored.path

    @property
    def nbytes(self) -> int:
        return self._stored.nbytes

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def placeholder(self, name: str) -> torch.Tensor:
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
                    f"{self.path}, {CURE}"
                )

    def place(self, name: str) -> Place:
        placeholder = self.placeholder(name)
        record = self._record_of(placeholder)
        if record is None:
            return Place(self.path, None, None)
        return Place(self.path, self._stored.payloads.entries[record].name, self._stored.offset_of(record, placeholder))

    def tensor(self, name: str) -> torch.Tensor:
        placeholder = self.placeholder(name)
        record = self._record_of(placeholder)
        return self._rebuilt(name) if record is None else self._stored.tensor(record, placeholder)

    def is_plain(self, name: str) -> bool:
        placeholder = self.placeholder(name)
        return is_plain(placeholder) and (not placeholder.is_meta or self._record_of(placeholder) is not None)

    def has_views(self, name: str) -> bool:
        return self._record_of(self.placeholder(name)) is not None

    def is_read_whole(self, name: str) -> bool:
        record = self._record_of(self.placeholder(name))
        return record is not None and self._stored.is_compressed(record)

    def view(self, name: str, view: torch.Tensor) -> torch.Tensor:
        record = self._record_of(self.placeholder(name))
        assert record is not None, "has no views"
        return self._stored.view(record, view)

    @property
    def stored_object(self) -> ObjectTensors:
        return self

    def made_on(self, take: Callable[[str, int], torch.UntypedStorage]) -> Any:
        raise NotImplementedError

    def pieces(self, record: str, piece_nbytes: int) -> Iterator[memoryview]:
        payloads = self._stored.payloads
        index = payloads.index(record)
        entry = payloads.entries[index]
        if entry.compressed:
            whole = payloads.archive.load_storages([index], verify=False, progress=None)[0]
            yield memory_of(torch.empty(0, dtype=torch.uint8, device="cpu").set_(whole))
            return
        buffer = memoryview(bytearray(min(piece_nbytes, entry.nbytes)))
        for at in range(0, entry.nbytes, piece_nbytes):
            piece = buffer[: entry.nbytes - at]
            payloads.archive.read_range(index, at, piece)
            yield piece

    @property
    def others(self) -> Sequence[str]:
        return self._counted(self._others)

    def other_values(self) -> Iterator[tuple[str, Any]]:
        return self._others.items()

    @property
    def hidden(self) -> Sequence[str]:
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
        return dict(self._refused)

    def close(self) -> None:
        self._stored.close()
        self._close()
