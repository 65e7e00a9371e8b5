"""Paths through nested containers in words, and what is said of two that are spelled alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..untrusted.limits import shown


def spelled(path: Iterable[Any]) -> str:
    """Keys and indices, from the root: such as ``['layers'][0]['weight']``."""
    return "".join(f"[{key!r}]" for key in path)


def clash(name: str, paths: Sequence[Iterable[Any]]) -> str:
    """Says of the first two paths that both would be called ``name``."""
    first, second = (shown(spelled(path)) for path in paths[:2])
    return f"{first} and {second} would both be called {shown(name)!r}"
