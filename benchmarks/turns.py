"""Whose turn it is: a save leaves the page cache, the free memory and the disk to whoever comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turn(contenders: Sequence[T], number: int) -> list[T]:
    """The order of round `number`. In 2 n rounds each comes after each other one twice (E. J. Williams, 1949)."""
    n = len(contenders)
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(n)]  # 0, 1, -1, 2, -2, ...
    order = [contenders[(step + number) % n] for step in zigzag]
    return order[::-1] if number // max(1, n) % 2 else order
