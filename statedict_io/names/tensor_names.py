"""Flat names for the tensors inside nested containers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from ..errors import StateDictIOError
from ..untrusted.limits import SPARE_NBYTES, shown
from ..untrusted.on_demand import OnDemand
from .named_parts import NamedParts, Parts
from .spellings import clash
from .tensor_search import TensorSearch

_T = TypeVar("_T")
#: what a name takes besides its characters, and what a tensor of its own makes room for
_NAME_NBYTES = 200
_TENSOR_NBYTES = 600
_MAX_CLASHES = 8  # that are looked up


def flat_tensors(
    root: Any, kinds: tuple[type[_T], ...], file_nbytes: int
) -> tuple[dict[str, _T], OtherNames, HiddenTensors]:
    """The tensors, instances of ``kinds``, in ``root`` by dotted path, in order, the names of everything else, and a
    sentence for each tensor that is among neither.

    Keys and indices are joined with dots, nothing is escaped: ``{"a": {"b": t}}`` and ``{"a.b": t}`` both have
    ``a.b``. Where two paths are spelled alike the one with fewer parts wins, so a literal dotted key does. A tensor
    that is itself ``root`` is called "". Objects other than mappings, lists and tuples are not entered.

    Raises:
        StateDictIOError: there are many more names than a file of ``file_nbytes`` needs, or no name for a key.
    """
    tensors: dict[str, _T] = {}
    depths: dict[str, int] = {}
    clashing: set[str] = set()
    spent = 0
    allowed = SPARE_NBYTES + file_nbytes
    for name, keys, tensor in NamedParts(root, _parts_of, lambda part: isinstance(part, kinds), file_nbytes):
        if name in tensors:
            clashing.add(name)
        if name not in tensors or len(keys) < depths[name]:
            tensors[name] = tensor
            depths[name] = len(keys)
        spent += _NAME_NBYTES + len(name) * (1 if name.isascii() else 4)
        if spent > allowed:
            num_distinct = len({id(known) for known in tensors.values()})
            allowed = SPARE_NBYTES + file_nbytes + _TENSOR_NBYTES * num_distinct
            if spent > allowed:
                raise StateDictIOError(
                    f"{len(tensors)} names lead to its {num_distinct} tensors, because containers share parts, or "
                    "names are long; load it with statedict_io.load"
                )
    return tensors, OtherNames(root, kinds, file_nbytes), HiddenTensors(root, kinds, file_nbytes, clashing)


class _FoundAnew(OnDemand[str]):
    """What iterating gives is counted once and not kept."""

    @functools.cached_property
    def _number(self) -> int:
        return sum(1 for _ in self)

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [*itertools.islice(self, *index.indices(len(self)))]
        found = [*itertools.islice(self, index, index + 1)] if index >= 0 else [[*self][index]]
        return found[0]


class OtherNames(_FoundAnew):
    """Names of the values below a root that are neither tensors nor containers."""

    def __init__(self, root: Any, kinds: tuple[type, ...], file_nbytes: int) -> None:
        self._parts = NamedParts(root, _parts_of, lambda part: not isinstance(part, kinds), file_nbytes)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _, _ in self._parts)

    def items(self) -> Iterator[tuple[str, Any]]:
        """The names with the values."""
        return ((name, value) for name, _, value in self._parts)


class HiddenTensors(_FoundAnew):
    """A sentence for each tensor below a root that has no name of its own, or none at all.

    Args:
        clashing: names of more than one tensor.
    """

    def __init__(self, root: Any, kinds: tuple[type, ...], file_nbytes: int, clashing: set[str]) -> None:
        self._named = NamedParts(root, _parts_of, lambda part: isinstance(part, kinds), file_nbytes)
        self._others = NamedParts(root, _parts_of, lambda part: not isinstance(part, kinds), file_nbytes)
        self._kinds = kinds
        self._file_nbytes = file_nbytes
        self._clashing = sorted(clashing)[:_MAX_CLASHES]

    def __iter__(self) -> Iterator[str]:
        yield from self._clashes()
        search = TensorSearch(self._kinds, self._file_nbytes)
        for name, _, value in self._others:
            if search.is_in(value):
                yield f"{shown(name)!r} is a {type(value).__name__} with tensors in it"

    def _clashes(self) -> Iterator[str]:
        paths: dict[str, list[list[Any]]] = {name: [] for name in self._clashing}
        for name, keys, _ in self._named if paths else ():
            if name in paths and len(paths[name]) < 2:
                paths[name].append(keys[1:])
        return (clash(name, found) for name, found in paths.items())


def _parts_of(value: Any) -> Parts | None:
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple)) else None
