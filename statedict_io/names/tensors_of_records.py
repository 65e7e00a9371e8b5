"""Which tensors live in which record, read off ``data.pkl`` without unpickling it.

It serves error messages, where the file may be hostile and torch's unpickler may refuse it: what it does not understand
it leaves out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from ..pickles.traced_pickle import Call, Global, Items, Reference, TracedPickle
from ..untrusted.limits import SPARE_NBYTES
from .named_parts import SAME_NAME, NamedParts, Parts

_NAME_NBYTES = 100


def tensors_by_record(data_pkl: bytes, file_nbytes: int) -> dict[str, list[str]]:
    """Dotted names of the tensors in each record (``data/0``), best effort.

    Args:
        data_pkl: the record.
        file_nbytes: of the file: memory and time are in proportion to it. Where more would be needed, names are
            missing.
    """
    found: dict[str, list[str]] = {}
    left = file_nbytes // 2 + SPARE_NBYTES // 2
    try:
        root = TracedPickle(data_pkl, max(0, file_nbytes - len(data_pkl)) + SPARE_NBYTES).follow(abridges=True)
        for name, _, reference in NamedParts(root, _parts_of, lambda part: type(part) is Reference, file_nbytes):
            saved_id = reference.saved_id
            is_storage = isinstance(saved_id, tuple) and len(saved_id) >= 3 and saved_id[0] in ("storage", b"storage")
            if is_storage and type(saved_id[2]) is str:
                left -= _NAME_NBYTES + len(name) * (1 if name.isascii() else 4)
                if left < 0:
                    break
                names = found.setdefault(f"data/{saved_id[2]}", [])
                if name not in names[-1:]:
                    names.append(name)
    except Exception:  # a limit, or a damaged stream: they can fail anywhere
        return found
    return found


class _Made:
    """Arguments and states: what a call is made of has the name of the call."""

    __slots__ = ("items",)

    def __init__(self, items: tuple[Any, ...]) -> None:
        self.items = items

    def parts(self) -> Iterator[tuple[Any, Any]]:
        return ((SAME_NAME, _Made(item) if isinstance(item, tuple) else item) for item in self.items)


def _parts_of(value: Any) -> Parts | None:
    if isinstance(value, Items):
        return ((_key(value[at]), value[at + 1]) for at in range(0, len(value), 2))
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    if isinstance(value, _Made):
        return value.parts()
    if isinstance(value, Call):
        put_in = _parts_of(value.items)
        return itertools.chain(_Made((value.arguments, value.state)).parts(), put_in or ())
    return None


def _key(key: Any) -> Any:
    if isinstance(key, Global):
        return key.name
    return "?" if isinstance(key, (list, Call, Reference)) else key
