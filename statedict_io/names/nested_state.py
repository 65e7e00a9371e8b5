"""The nested state that DCP has flattened, once more."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import StateDictIOError
from .spellings import spelled

_MAX_GAP = 1_000_000  # of a list's items, which have no values


def nested(values: Iterable[tuple[str, Any]], paths: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Undoes DCP's flattening.

    Args:
        values: (flat name, value), in the order of the state.
        paths: flat name -> path; a name without one is a key of the top level.

    Raises:
        StateDictIOError: two values would be in one place, or one inside the other; names both.
    """
    from torch.distributed.checkpoint._traverse import set_element

    values = list(values)
    _check_places({name: paths.get(name, (name,)) for name, _ in values})
    state: dict[str, Any] = {}
    for name, value in values:
        # Interned as the names of modules and parameters are: pickle writes an object that it meets again as a
        # reference, and "storage" is also a word of the stream.
        path = tuple(sys.intern(part) if type(part) is str else part for part in paths.get(name, (name,)))
        set_element(state, path, value)
    return state


def _check_places(paths: Mapping[str, tuple[Any, ...]]) -> None:
    """A place is a value or a mapping or a list, and has one name."""
    inside: dict[tuple[Any, ...], str] = {}  # a place with something in it -> the name of that
    kinds: dict[tuple[Any, ...], type] = {}  # of the keys that are used there
    for name, path in paths.items():
        is_path = type(path) is tuple and path and {type(part) for part in path} <= {str, int}
        if not is_path or type(path[0]) is not str:
            raise StateDictIOError(f"{name!r} has {path!r} as its place, which is not a path of keys and indices")
        for depth, part in enumerate(path):
            place = path[:depth]
            other = inside.setdefault(place, name)
            if kinds.setdefault(place, type(part)) is not type(part):
                raise _two_in_one_place(other, name, paths)
            if type(part) is int and not 0 <= part < len(paths) + _MAX_GAP:
                raise StateDictIOError(f"{name!r} has {part} as an index in a list")
    places: dict[tuple[Any, ...], str] = {}
    for name, path in paths.items():
        other = places.setdefault(path, name)
        if other == name:
            other = inside.get(path, name)
        if other != name:
            raise _two_in_one_place(other, name, paths)


def _two_in_one_place(first: str, second: str, paths: Mapping[str, tuple[Any, ...]]) -> StateDictIOError:
    return StateDictIOError(
        f"{first!r} at {spelled(paths[first])} and {second!r} at {spelled(paths[second])} exclude each other in a state"
    )
