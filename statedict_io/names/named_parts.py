"""Paths through nested containers, spelled with dots; lazily, because containers that share parts can have billions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ..errors import StateDictIOError
from ..untrusted.limits import (
    MAX_KEY_CHARACTERS,
    MAX_KEY_DEPTH,
    MAX_KEY_PARTS,
    MAX_NAMED_DEPTH,
    SPARE_NBYTES,
    max_named_characters,
    max_named_parts,
)

#: (key, part); :data:`SAME_NAME` as the key of a part that has the name of the whole
Parts = Iterable[tuple[Any, Any]]
SAME_NAME = object()


class NamedParts:
    """Goes through the containers below ``root`` once for each path that leads to them.

    Args:
        root: what was loaded, or stands for it.
        parts_of: the parts of a container; None for anything else.
        wanted: whether a part that is no container is named.
        nbytes: of the file: limits how many parts are visited, and how long names are.
        allows_cycles: False raises where a container is in itself; else it is not entered there once more.

    Iterating gives (name, keys, part). The keys are those on the way to the part, :data:`SAME_NAME` for the root the
    first of them, in one list that changes.
    """

    def __init__(
        self,
        root: Any,
        parts_of: Callable[[Any], Parts | None],
        wanted: Callable[[Any], bool],
        nbytes: int,
        *,
        allows_cycles: bool = True,
    ) -> None:
        self._root = root
        self._parts_of = parts_of
        self._wanted = wanted
        self._allows_cycles = allows_cycles
        self._max_visited = max_named_parts(nbytes)
        self._max_characters = max_named_characters(nbytes)
        self._max_prefix_characters = (nbytes + SPARE_NBYTES) // 8  # of up to 4 bytes each

    def __iter__(self) -> Iterator[tuple[str, list[Any], Any]]:
        root = self._root
        parts = self._parts_of(root)
        if parts is None:
            if self._wanted(root):
                yield "", [SAME_NAME], root
            return
        levels: list[tuple[Iterator[tuple[Any, Any]], Any]] = [(iter(parts), root)]
        keys: list[Any] = [SAME_NAME]  #: under which each level was entered
        prefixes: list[str | None] = [None]  #: of the outermost levels, made when they are needed
        prefix_characters = characters = 0
        inside = {id(root)}
        visited = 0
        while levels:
            try:
                key, part = next(levels[-1][0])
            except StopIteration:
                inside.discard(id(levels.pop()[1]))
                keys.pop()
                if len(prefixes) > len(levels):
                    prefix_characters -= len(prefixes.pop() or "")
                continue
            visited += 1
            if visited > self._max_visited:
                raise StateDictIOError(
                    f"its containers have more than {self._max_visited} parts, because they share them; load it with "
                    "statedict_io.load"
                )
            inner = self._parts_of(part)
            if inner is None:
                if self._wanted(part):
                    while len(prefixes) < len(keys):
                        prefixes.append(_joined(prefixes[-1], keys[len(prefixes)]))
                        prefix_characters += len(prefixes[-1] or "")
                        if prefix_characters > self._max_prefix_characters:
                            raise StateDictIOError("names of its parts are too long; load it with statedict_io.load")
                    name = _joined(prefixes[-1], key) or ""
                    characters += len(name)
                    if characters > self._max_characters:
                        raise StateDictIOError(
                            f"names of its parts have more than {self._max_characters} characters; load it with "
                            "statedict_io.load"
                        )
                    keys.append(key)
                    yield name, keys, part
                    keys.pop()
            elif id(part) not in inside:
                if len(levels) >= MAX_NAMED_DEPTH:
                    raise StateDictIOError(
                        f"its containers are nested more than {MAX_NAMED_DEPTH} deep; load it with statedict_io.load"
                    )
                levels.append((iter(inner), part))
                keys.append(key)
                inside.add(id(part))
            elif not self._allows_cycles:
                raise StateDictIOError("a container is in itself; load it with statedict_io.load")


def _joined(prefix: str | None, key: Any) -> str | None:
    """None: nothing has been named yet, as in ``root`` itself."""
    if key is SAME_NAME:
        return prefix
    return key_text(key) if prefix is None else f"{prefix}.{key_text(key)}"


def key_text(key: Any) -> str:
    """``str(key)``.

    Raises:
        StateDictIOError: it is made of too many parts, or they are too long.
    """
    if type(key) is str:
        return key
    if isinstance(key, (tuple, frozenset)) or torch.is_storage(key):
        _check_key(key)
    return str(key)


def _check_key(key: Any) -> None:
    pending, num_parts, characters, deepest = [(key, 1)], 0, 0, 0
    while pending:
        part, depth = pending.pop()
        num_parts += 1
        deepest = max(deepest, depth)
        if isinstance(part, (tuple, frozenset, list)):  # no list is a key but in a trace
            if len(part) > MAX_KEY_PARTS:
                num_parts += len(part)
            else:
                pending += [(inner, depth + 1) for inner in part]
        elif isinstance(part, (str, bytes)):
            characters += len(part)
        elif torch.is_storage(part):  # prints each of its elements
            num_parts += len(part)
        if num_parts > MAX_KEY_PARTS or characters > MAX_KEY_CHARACTERS or deepest > MAX_KEY_DEPTH:
            raise StateDictIOError(
                f"a key is nested more than {MAX_KEY_DEPTH} deep, or made of more than {MAX_KEY_PARTS} parts or "
                f"{MAX_KEY_CHARACTERS} characters, which gives no name; load it with statedict_io.load"
            )
