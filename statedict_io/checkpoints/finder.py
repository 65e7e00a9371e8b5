"""Finds checkpoints. Writes nothing, and goes on where others save and delete meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TypeVar

from ..errors import StateDictIOError
from . import soundness
from .entry import SavedCheckpoint, SkippedCheckpoint
from .facts import read_facts
from .folder import Folder, Listed
from .naming import Pattern
from .retention import Direction, Kept, ranked
from .soundness import Level, Unsound, Vanished
from .survey import Survey, survey

_MAX_LISTINGS = 100  # of a folder in which others delete what has just been found

T = TypeVar("T")
Ranking = Callable[[Survey], Iterable[tuple[int, Listed]]]


class Finder:
    """
    Attributes:
        damaged: name -> identity of the file that was found damaged, by any search; what cannot be read is not known
            to be.
    """

    def __init__(self, folder: Folder, pattern: Pattern) -> None:
        self._folder = folder
        self._pattern = pattern
        self.damaged: dict[str, str] = {}

    def first(
        self, ranking: Ranking, attempt: Callable[[SavedCheckpoint, Listed], T], skipped: list[SkippedCheckpoint]
    ) -> tuple[SavedCheckpoint, T] | None:
        """The first checkpoint of ``ranking`` for which ``attempt`` succeeds, with its result; None: there is none.

        Where there is none and some could not be read, that is no answer: a run that takes it for one begins anew.

        Args:
            attempt: raises Unsound or Vanished where it does not.
            skipped: is given those that were unsound.

        Raises:
            OSError: the folder cannot be listed; or none is sound and one cannot be read; or what ``attempt`` raises
                otherwise.
        """
        examined: dict[tuple[str, str], Vanished | None] = {}  # by (name, identity)
        unreadable: OSError | None = None
        for _ in range(_MAX_LISTINGS):
            has_vanished = False
            for step, listed in ranking(survey(self._folder, self._pattern)):
                key = (listed.name, listed.identity)
                entry = SavedCheckpoint(self._folder, listed.name, step, skipped)
                try:
                    if key in examined:
                        if (vanished := examined[key]) is None:
                            continue
                        raise Unsound(
                            f"{self._folder.shown(listed.name)}: {vanished.error.strerror}, but is listed",
                            vanished.error,
                        )
                    result = attempt(entry, listed)
                    entry.skipped = list(skipped)
                    return entry, result
                except Unsound as e:
                    examined[key] = None
                    unreadable = unreadable or e.error
                    skipped.append(SkippedCheckpoint(step, self._folder.shown(listed.name), str(e)))
                    if e.error is None:
                        self.damaged[listed.name] = listed.identity
                except Vanished as e:
                    examined[key], has_vanished = e, True
                    break
            if not has_vanished:
                if unreadable is not None:
                    raise unreadable
                return None
        raise StateDictIOError(
            f"{self._folder.path}: each of the {_MAX_LISTINGS} times that a checkpoint was found it had been deleted "
            "when it was opened; is another process told to keep too few?"
        )

    def check(self, level: Level, backend: str) -> Callable[[SavedCheckpoint, Listed], None]:
        """For :meth:`first`."""

        def attempt(_: SavedCheckpoint, listed: Listed) -> None:
            soundness.check(self._folder, listed, level, backend=backend)

        return attempt

    def judging(self, listed: Listed) -> AbstractContextManager[None]:
        """For an attempt: its errors that are the checkpoint's fault become those of :meth:`first`."""
        return soundness.judged(self._folder, listed)

    def by_metric(self, best: Direction) -> Ranking:
        def ranking(there: Survey) -> list[tuple[int, Listed]]:
            kept = [
                Kept(step, read_facts(self._folder, listed.name).metric) for step, listed in there.checkpoints.items()
            ]
            return [(each.step, there.checkpoints[each.step]) for each in ranked(kept, best)]

        return ranking

    def named(self, step: int) -> Ranking:
        return lambda there: [(step, there.checkpoints[step])] if step in there.checkpoints else []

    def all(self) -> list[SavedCheckpoint]:
        """Ascending, without those that only have such a name."""
        there = survey(self._folder, self._pattern).checkpoints
        return [SavedCheckpoint(self._folder, f.name, step) for step, f in there.items() if f.kind != "other"]

    def is_damaged(self, listed: Listed) -> bool:
        return self.damaged.get(listed.name) == listed.identity


def newest_first(there: Survey) -> Iterable[tuple[int, Listed]]:
    return reversed(there.checkpoints.items())
