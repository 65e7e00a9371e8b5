"""The tensors in a checkpoint directory of ``torch.distributed.checkpoint``, whole or in parts."""

from __future__ import annotations

import io
import math
import pickle
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from ...names.tensor_names import flat_tensors
from ...pickles.set_aside import Refused
from ...progress import ProgressCallback, over_parts
from ..dcp_folder import DCPFolder, Part, StoredTensor, check_piece, narrowed
from ..dcp_metadata import CURE
from ..opened_bytes import PartOfBytes
from ..safetensors_payloads import on_storage
from ..verification import check_all
from .lazy_file import LazyFile
from .named_tensors import Place
from .placeholders import DataFeed
from .strided_reads import memory_of


class _PartOfTensor:
    """An archive with a tensor in it, open."""

    def __init__(self, folder: DCPFolder, part: Part, dtype: torch.dtype) -> None:
        self.part = part
        self.file = LazyFile(folder.open(part))
        self.placeholder = self.file.unpickle()
        check_piece(folder, part, self.placeholder, dtype)

    def read(self, view: torch.Tensor, target: torch.Tensor) -> None:
        if self.file.is_plain(self.placeholder):
            self.file.read(view, target)
        else:  # of a kind that is made with its data
            whole = self.file.unpickle(feed=DataFeed(self.file.records))
            target.copy_(whole.as_strided(view.size(), view.stride(), view.storage_offset()))


class DCPTensors:
    """See :class:`~.named_tensors.NamedTensors` and :class:`~.named_tensors.StoredObject`. Values that are no plain
    tensors are read when it is opened."""

    metadata: dict[str, str] = {}  # noqa: RUF012  nothing is ever added

    def __init__(self, folder: DCPFolder, *, weights_only: bool, close: Callable[[], None]) -> None:
        self._folder = folder
        self._weights_only = weights_only
        self._close = close
        self._last = threading.local()  # the part that each thread has read last
        folder.check_fits()
        self._flat: dict[str, Any] = {}
        for name, stored in folder.entries.items():
            self._flat[name] = self._value(name) if stored is None else _placeholder(stored)
        self._tensors, self._others, self._hidden = flat_tensors(self._flat, (torch.Tensor, Refused), self.nbytes)
        self.refused: dict[str, tuple[str, ...]] = {
            name: found.names for name, found in self._tensors.items() if isinstance(found, Refused)
        }
        for name in self.refused:
            del self._tensors[name]

    def _value(self, name: str) -> Any:
        opened = self._folder.open(self._folder.value(name))
        file = LazyFile(opened)
        try:
            return file.unpickle(weights_only=self._weights_only, feed=DataFeed(file.records))
        except pickle.UnpicklingError:
            if not self._weights_only:
                raise
            return Refused(_needs(opened))

    @property
    def path(self) -> str:
        return self._folder.path

    @property
    def nbytes(self) -> int:
        return self._folder.nbytes

    @property
    def stored_object(self) -> DCPTensors:
        return self

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def placeholder(self, name: str) -> torch.Tensor:
        found = self._tensors.get(name)
        if found is None:
            for refused, needs in self.refused.items():
                if name == refused or name.startswith(f"{refused}."):
                    raise KeyError(
                        f"{refused!r} needs {', '.join(needs)}, which torch's restricted unpickler refuses; if you "
                        f"trust {self.path}, {CURE}"
                    )
            raise KeyError(name)
        return found

    def _stored(self, name: str) -> StoredTensor | None:
        self.placeholder(name)
        return self._folder.entries.get(name)

    def place(self, name: str) -> Place:
        stored = self._stored(name)
        if stored is None or len(stored.parts) != 1:
            return Place(self.path, None, None)
        return Place(self._folder.path_of(stored.parts[0]), name, None)

    def is_plain(self, name: str) -> bool:
        return self._stored(name) is not None

    def has_views(self, name: str) -> bool:
        return self._stored(name) is not None

    def is_read_whole(self, name: str) -> bool:
        return False

    def tensor(self, name: str) -> torch.Tensor:
        stored = self._stored(name)
        if stored is None:
            return self.placeholder(name)
        found = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        self._fill(stored, (0,) * len(stored.shape), found)
        return found

    def view(self, name: str, view: torch.Tensor) -> torch.Tensor:
        stored = self._stored(name)
        assert stored is not None, "has no views"
        if view.numel() == 0:
            return torch.empty(view.shape, dtype=view.dtype, device="cpu")
        first = view.storage_offset()
        last = first + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
        offsets, sizes = _box(stored.shape, first, last)
        rows = torch.empty(sizes, dtype=stored.dtype, device="cpu")
        self._fill(stored, offsets, rows)
        begin = sum(at * step for at, step in zip(offsets, _steps(stored.shape), strict=True))
        return rows.view(-1).as_strided(view.shape, view.stride(), first - begin).contiguous()

    def _fill(self, stored: StoredTensor, offsets: Sequence[int], target: torch.Tensor) -> None:
        """With the elements from ``offsets`` on."""
        for part in stored.parts:
            begin = [max(a, b) for a, b in zip(offsets, part.offsets, strict=True)]
            end = [
                min(a + n, b + m) for a, n, b, m in zip(offsets, target.shape, part.offsets, part.sizes, strict=True)
            ]
            sizes = [b - a for a, b in zip(begin, end, strict=True)]
            if any(size <= 0 for size in sizes):
                continue
            opened = self._opened(part, stored.dtype)
            opened.read(
                narrowed(opened.placeholder.detach(), [a - b for a, b in zip(begin, part.offsets, strict=True)], sizes),
                narrowed(target, [a - b for a, b in zip(begin, offsets, strict=True)], sizes),
            )

    def _opened(self, part: Part, dtype: torch.dtype) -> _PartOfTensor:
        found: _PartOfTensor | None = getattr(self._last, "part", None)
        if found is None or found.part != part:
            found = self._last.part = _PartOfTensor(self._folder, part, dtype)
        return found

    @property
    def others(self) -> Sequence[str]:
        return self._others

    @property
    def hidden(self) -> Sequence[str]:
        return self._hidden

    def other_values(self) -> Iterator[tuple[str, Any]]:
        return self._others.items()

    def made_on(self, take: Callable[[str, int], torch.UntypedStorage]) -> Any:
        def made(name: str, value: Any) -> Any:
            stored = self._folder.entries[name]
            if stored is None:
                return value
            return on_storage(take(name, stored.nbytes), stored.dtype, tuple(stored.shape))

        return self._folder.nested([(name, made(name, value)) for name, value in self._flat.items()])

    def pieces(self, record: str, piece_nbytes: int) -> Iterator[memoryview]:
        stored = self._folder.tensor(record)
        flat = _placeholder(stored).view(-1)
        step = max(piece_nbytes // stored.dtype.itemsize, 1)
        for at in range(0, flat.numel(), step):
            piece = self.view(record, flat[at : at + step])
            yield memory_of(piece)

    def facts(self) -> dict[str, Any]:
        parts = [*self._folder.parts()]
        return {
            "kind": "torch.distributed.checkpoint",
            "files": len({part.file for part in parts}),
            "parts": len(parts),
        }

    def check(self, progress: ProgressCallback | None = None) -> None:
        parts = [*self._folder.parts()]
        for part, report in zip(parts, over_parts(progress, [part.nbytes for part in parts]), strict=True):
            check_all(LazyFile(self._folder.open(part)).records, report)

    def close(self) -> None:
        self._folder.close()
        self._last = threading.local()
        self._close()


def _placeholder(stored: StoredTensor) -> torch.Tensor:
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def _needs(opened: PartOfBytes) -> tuple[str, ...]:
    """The classes and functions that torch's restricted unpickler refuses there."""
    try:
        return tuple(sorted(get_unsafe_globals_in_checkpoint(io.BytesIO(opened.read_at(0, opened.nbytes)))))
    except pickle.UnpicklingError as e:  # an opcode that it does not know
        return (str(e),)


def _steps(shape: Sequence[int]) -> list[int]:
    """Of a contiguous tensor, in elements."""
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _box(shape: Sequence[int], first: int, last: int) -> tuple[list[int], list[int]]:
    """(offsets, sizes) of the smallest part of a contiguous tensor that lies in one piece and has the elements from
    ``first`` to ``last``: all in one row of the outer dimensions, some rows of the next, all of the others."""
    offsets, sizes = [0] * len(shape), [*shape]
    for dim, step in enumerate(_steps(shape)):
        begin, end = first // step, last // step
        offsets[dim], sizes[dim] = begin, end - begin + 1
        if begin != end:
            break
        first, last = first - begin * step, last - begin * step
    return offsets, sizes
