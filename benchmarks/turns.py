"""Whose turn it is: a save leaves the page cache, the free memory and the disk to whoever comes next."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def rounds(contenders: Sequence[T], count: int, seconds: float = math.inf) -> Iterator[tuple[int, list[T], bool]]:
    """(number, order, whether it is the last) of each round: number 0, which warms up, and `count` more, or fewer where
    the next would end after `seconds`; at least one."""
    began = time.monotonic()
    for number in range(count + 1):
        used = time.monotonic() - began
        # A round takes about as long as the average so far; the last one may do more.
        last = number == count or (number > 0 and used + 2.5 * used / number > seconds)
        yield number, in_turn(contenders, number), last
        if last:
            return


def in_turn(contenders: Sequence[T], number: int) -> list[T]:
    """The order of round `number`. In 2 n rounds each comes after each other one twice (E. J. Williams, 1949)."""
    n = len(contenders)
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(n)]  # 0, 1, -1, 2, -2, ...
    order = [contenders[(step + number) % n] for step in zigzag]
    return order[::-1] if number // max(1, n) % 2 else order
