"""A state flattened as DCP does it, but so that nothing is lost on the way back, in time and memory in proportion to
its file.

``torch.distributed.checkpoint._nested_dict.flatten_state_dict`` recurses, goes through a list again for each list
around it, and does not end where containers are shared often enough.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ..errors import StateDictIOError
from ..names.named_parts import NamedParts, Parts, key_text
from ..names.spellings import clash
from ..untrusted.limits import SPARE_NBYTES

# What a value takes besides the characters of its name, and for each part of its path; and a list that is looked at.
_NAME_NBYTES = 300
_PATH_PART_NBYTES = 60
_LIST_NBYTES = 200


class FlatState(NamedTuple):
    values: dict[str, Any]  #: by flat name, in order
    paths: dict[str, tuple[str | int, ...]]  #: by flat name; mappings' keys are strings, lists' indices numbers
    renamed: list[str]  #: flat names with a mapping's key in them that is no string and has become one


def flatten(state: Mapping[Any, Any], file_nbytes: int) -> FlatState:
    """Mappings are entered, and lists in which, or in whose lists, is a tensor or a mapping; all else is a value.

    An empty mapping is a value too: stock DCP leaves it out.

    Raises:
        StateDictIOError: two paths would have one name; says which. Or a container is in itself, there are many more
            names than a file of ``file_nbytes`` needs, or no name for a key.
    """
    flat = FlatState({}, {}, [])
    budget = _Budget(file_nbytes)
    containers = _Containers(state, budget)
    parts = NamedParts(state, containers.parts_of, lambda _: True, file_nbytes, allows_cycles=False)
    for name, keys, value in parts:
        if name in flat.values:
            same = (found[1:] for other, found, _ in parts if other == name)
            raise StateDictIOError(f"{clash(name, [*itertools.islice(same, 2)])}; rename one of them and save it again")
        budget.spend(_NAME_NBYTES + len(name) * (1 if name.isascii() else 4) + _PATH_PART_NBYTES * len(keys))
        flat.values[name] = value
        flat.paths[name] = tuple(int(key) if type(key) is _Index else key_text(key) for key in keys[1:])
        if not {type(key) for key in keys[1:]} <= {str, _Index}:
            flat.renamed.append(name)
    return flat


class _Index(int):
    """Of a list, not a key of a mapping."""


class _Budget:
    def __init__(self, file_nbytes: int) -> None:
        self._left = SPARE_NBYTES + file_nbytes

    def spend(self, nbytes: int) -> None:
        self._left -= nbytes
        if self._left < 0:
            raise StateDictIOError(
                "it has too many values or lists for its size, because containers share parts, or names are long; "
                "load it with statedict_io.load"
            )


class _Containers:
    def __init__(self, state: Mapping[Any, Any], budget: _Budget) -> None:
        self._state = state
        self._budget = budget
        self._entered: dict[int, bool] = {}  # by address of a list that has lists in it; they live as long as this

    def parts_of(self, value: Any) -> Parts | None:
        if isinstance(value, Mapping):
            return value.items() if value or value is self._state else None
        return (
            zip(map(_Index, itertools.count()), value, strict=False)
            if isinstance(value, list) and self._is_entered(value)
            else None
        )

    def _is_entered(self, value: list[Any]) -> bool:
        if id(value) in self._entered:
            return self._entered[id(value)]
        levels: list[tuple[list[Any], Iterator[Any]]] = [(value, iter(value))]
        found = False  # of the list that was left last
        while levels:
            current, rest = levels[-1]
            inner = None
            if not found:
                for entry in rest:
                    if isinstance(entry, list):
                        known = self._entered.get(id(entry))
                        if known is None:
                            inner = entry
                            break
                        found = known
                    else:
                        found = isinstance(entry, (Mapping, torch.Tensor))
                    if found:
                        break
            if inner is None:
                levels.pop()
                if found or id(current) in self._entered:
                    self._note(current, found)
                continue
            self._note(current, False)  # also where it is in itself
            levels.append((inner, iter(inner)))
        return found

    def _note(self, value: list[Any], found: bool) -> None:
        if id(value) not in self._entered:
            self._budget.spend(_LIST_NBYTES)
        self._entered[id(value)] = found
