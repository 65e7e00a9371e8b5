"""A nested state with flat names, as DCP flattens it, but so that nothing is lost on the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..errors import StateDictIOError
from ..reading.spellings import clash

_MAX_DEPTH = 1000  # deeper ones are in themselves, or cannot be pickled


class FlatState(NamedTuple):
    values: dict[str, Any]  #: by flat name
    paths: dict[str, tuple[str | int, ...]]  #: by flat name; mappings' keys are strings, lists' indices numbers
    renamed: list[str]  #: flat names with a mapping's key in them that is no string and has become one


def flat_state(state: Mapping[Any, Any]) -> FlatState:
    """Mappings are entered, and lists in which, or in whose lists, is a tensor or a mapping; all else is a value.

    An empty mapping is a value too: stock DCP leaves it out.

    Raises:
        StateDictIOError: two paths would have one name; says which. Or a container is in itself.
    """
    found = FlatState({}, {}, [])
    pending: list[tuple[tuple[str | int, ...], bool, Any]] = [((), False, state)]
    while pending:
        path, is_renamed, value = pending.pop()
        if len(path) > _MAX_DEPTH:
            raise StateDictIOError(f"containers are nested more than {_MAX_DEPTH} deep; load it with statedict_io.load")
        if isinstance(value, Mapping) and (value or not path):
            parts: Any = [((*path, str(key)), is_renamed or type(key) is not str, part) for key, part in value.items()]
            pending += reversed(parts)
        elif isinstance(value, list) and _is_entered(value):
            pending += reversed([((*path, index), is_renamed, part) for index, part in enumerate(value)])
        else:
            name = ".".join(map(str, path))
            if name in found.values:
                raise StateDictIOError(f"{clash(name, state)}; rename one of them and save it again")
            found.values[name] = value
            found.paths[name] = path
            if is_renamed:
                found.renamed.append(name)
    return found


def _is_entered(value: list[Any]) -> bool:
    return any(
        isinstance(part, (Mapping, torch.Tensor)) or (isinstance(part, list) and _is_entered(part)) for part in value
    )
