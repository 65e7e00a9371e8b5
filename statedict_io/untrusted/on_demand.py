"""Sequences whose items are made when they are asked for: a file of some kilobytes can have millions of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar

_T = TypeVar("_T")


class OnDemand(Sequence[_T]):
    """Compared and shown as a list would be; a slice of it is a list."""

    @abstractmethod
    def __iter__(self) -> Iterator[_T]: ...

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (OnDemand, list)):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = [repr(item) for item, _ in zip(self, range(20), strict=False)]
        more = [f"... {len(self) - len(shown)} more"] if len(self) > len(shown) else []
        return f"[{', '.join(shown + more)}]"
