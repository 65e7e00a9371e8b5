"""Flat names for the tensors inside nested containers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import StateDictIOError
from .reading.spellings import clash, holds_tensor

# Containers that share parts can have billions of paths in a file of a few hundred bytes.
_MAX_VISITED = 4_000_000
_MAX_CHARACTERS = 128 << 20
_MAX_CLASHES = 8  # that are looked up


_T = TypeVar("_T")


def flat_tensors(root: Any, kinds: tuple[type[_T], ...]) -> tuple[dict[str, _T], list[str], list[str]]:
    """The tensors, instances of ``kinds``, in ``root`` by dotted path, in order, the names of everything else, and a
    sentence for each tensor that is among neither.

    Keys and indices are joined with dots, nothing is escaped: ``{"a": {"b": t}}`` and ``{"a.b": t}`` both have
    ``a.b``. Where two paths are spelled alike the one with fewer parts wins, so a literal dotted key does. A tensor
    that is itself ``root`` is called "". Objects other than mappings, lists and tuples are not entered.
    """
    tensors: dict[str, _T] = {}
    depths: dict[str, int] = {}
    others: list[str] = []
    clashing: set[str] = set()
    hidden: list[str] = []
    pending: list[tuple[str, Any, tuple[int, ...]]] = [("", root, ())]
    visited = characters = 0
    while pending:
        name, value, inside = pending.pop()
        visited += 1
        characters += len(name)
        if visited > _MAX_VISITED or characters > _MAX_CHARACTERS:
            raise StateDictIOError(
                f"the checkpoint's containers have more than {_MAX_VISITED} parts or names of more than "
                f"{_MAX_CHARACTERS} characters; load it with statedict_io.load"
            )
        if isinstance(value, kinds):
            if name in tensors:
                clashing.add(name)
            if name not in tensors or len(inside) < depths[name]:
                tensors[name] = value
                depths[name] = len(inside)
        elif isinstance(value, (Mapping, list, tuple)):
            if id(value) in inside:
                continue
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            inside = (*inside, id(value))
            parts = [(f"{name}.{key}" if len(inside) > 1 else str(key), item, inside) for key, item in items]
            pending.extend(reversed(parts))
        else:
            others.append(name)
            if holds_tensor(value, kinds):
                hidden.append(f"{name!r} is a {type(value).__name__} with tensors in it")
    return tensors, others, [clash(name, root) for name in sorted(clashing)[:_MAX_CLASHES]] + hidden
