"""Which checkpoints go: a pure function of what is there and of the rules."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from ..options import check_at_least, check_choice

Direction = Literal["min", "max"]


@dataclass(frozen=True)
class Rules:
    """A checkpoint that one of them keeps stays.

    Raises:
        TypeError: a number that is not whole.
        ValueError: one below 1, or ``keep_best`` without what is best.
    """

    keep_last: int | None = None  #: the newest, by step; None: all, or the newest where another rule is given
    keep_every: int | None = None  #: those whose step is a multiple
    keep_best: int | None = None
    best: Direction | None = None

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every", "keep_best"):
            number = getattr(self, name)
            if number is not None and not isinstance(number, numbers.Integral):
                raise TypeError(f"{name} must be a whole number or None, got {number!r}")
            check_at_least(1, **{name: number})
        if self.best is not None:
            check_choice("best", self.best, ("min", "max"))
        if self.keep_best is not None and self.best is None:
            raise ValueError("keep_best needs best='min' or best='max'")

    @property
    def keep_all(self) -> bool:
        return self.keep_last is None and self.keep_every is None and self.keep_best is None


@dataclass(frozen=True)
class Kept:
    """A checkpoint that is there."""

    step: int
    metric: float | None = None
    is_damaged: bool = False  #: known to be; what nobody has looked at counts as sound
    is_proven: bool = False  #: known to be sound


def superfluous(there: Sequence[Kept], rules: Rules, spared: Collection[int] = ()) -> list[int]:
    """The steps that go, in ascending order; of the proven ones the newest never does.

    Damaged ones count for no rule; they go when there are ``keep_last`` newer ones that count.

    Args:
        spared: steps that stay whatever the rules say.
    """
    if rules.keep_all:
        return []
    counting = sorted((each for each in there if not each.is_damaged), key=lambda each: each.step)
    newest = [each.step for each in counting[-(rules.keep_last or 1) :]]
    stay = {*spared, *newest}
    if rules.keep_every is not None:
        stay.update(each.step for each in counting if each.step % rules.keep_every == 0)
    if rules.keep_best is not None and rules.best is not None:
        stay.update(each.step for each in ranked(counting, rules.best)[: rules.keep_best])
    stay.update([each.step for each in counting if each.is_proven][-1:])
    oldest = newest[0] if len(newest) == (rules.keep_last or 1) else -1
    stay.update(each.step for each in there if each.is_damaged and each.step > oldest)
    return sorted({each.step for each in there} - stay)


def ranked(there: Sequence[Kept], best: Direction) -> list[Kept]:
    """Those with a metric that is a number, the best first; of equals the newer one."""
    sign = 1 if best == "min" else -1
    known = [each for each in there if each.metric is not None and not math.isnan(each.metric)]
    return sorted(known, key=lambda each: (sign * (each.metric or 0.0), -each.step))
