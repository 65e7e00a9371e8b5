"""Where flat names leave something out: paths that are spelled alike, and tensors in what is not entered."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch

Path = tuple[Any, ...]  #: keys and indices, from the root

_SCALARS = (str, bytes, bytearray, int, float, complex, type(None), torch.dtype, torch.Size, torch.device)


def spelled(path: Path) -> str:
    """Such as ``['layers'][0]['weight']``."""
    return "".join(f"[{key!r}]" for key in path)


def paths_called(name: str, root: Any) -> Iterator[Path]:
    """All paths below ``root`` that give ``name`` when their parts are joined with dots, whatever lies there."""
    pending: list[tuple[Path, str, Any]] = [((), "", root)]
    while pending:
        path, prefix, value = pending.pop()
        if path and prefix == name:
            yield path
        if isinstance(value, (Mapping, list, tuple)) and (not path or name.startswith(f"{prefix}.")):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            parts = [((*path, key), f"{prefix}.{key}" if path else str(key), part) for key, part in items]
            pending += [part for part in reversed(parts) if name.startswith(part[1])]


def clash(name: str, root: Any) -> str:
    """Says which two paths are both called ``name``."""
    first, second = [*paths_called(name, root)][:2]
    return f"{spelled(first)} and {spelled(second)} would both be called {name!r}"


class _Found(Exception):
    pass


def holds_tensor(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether there is one of ``kinds`` in an object that flat names do not enter, such as a set."""
    if isinstance(value, _SCALARS):
        return False

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> None:
            if isinstance(obj, kinds):
                raise _Found

    try:
        Pickler(io.BytesIO()).dump(value)
    except _Found:
        return True
    except Exception:  # what cannot be pickled was not unpickled either
        return False
    return False
