"""What a save does around the writing of its checkpoint.

The order is what makes it safe to be killed at any moment: the facts, the checkpoint, the links, then the deletions.
Only names count: no file says what is there, or which one is the newest.

Used from any thread, and by a signal handler in the middle of another call. The lock is held while the folder is put in
order after a commit, never while a checkpoint is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import CheckpointDirectoryWarning, StateDictIOError
from . import facts, links
from .background import Background
from .deletion import Deletions
from .facts import NOTHING_KNOWN, Facts, read_facts
from .finder import Finder
from .folder import Folder, Listed
from .naming import Pattern
from .retention import Kept, Rules, ranked, superfluous
from .soundness import digest_of
from .survey import Survey, survey
from .writer_lock import WriterLock

# As of temporaries: whoever saves this long into a folder that he does not have for himself is gone.
_FOREIGN_FACTS_SECONDS = 24 * 3600


class ReentrantLock:
    """One of which a thread can tell that it has it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._here = threading.local()

    def __enter__(self) -> None:
        self._here.depth = self._depth + 1  # before it has it: a signal handler may come up in between
        try:
            self._lock.acquire()
        except BaseException:
            self._here.depth = self._depth - 1
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._here.depth = self._depth - 1

    @property
    def _depth(self) -> int:
        return getattr(self._here, "depth", 0)

    def is_mine(self) -> bool:
        return self._depth > 0


@dataclass
class Announced:
    """A checkpoint whose facts are there and that is about to be."""

    step: int
    name: str
    path: str
    facts: Facts
    version_before: str | None  #: of the file that it replaces
    facts_before: Facts


class Writer:
    """
    Attributes:
        finder: knows which checkpoints are damaged.
    """

    def __init__(
        self,
        folder: Folder,
        pattern: Pattern,
        rules: Rules,
        finder: Finder,
        *,
        has_links: bool,
        allow_other_writers: bool,
    ) -> None:
        self._folder = folder
        self._pattern = pattern
        self._rules = rules
        self._finder = finder
        self._has_links = has_links
        self._allow_other_writers = allow_other_writers
        self._lock = ReentrantLock()
        self._writer_lock: WriterLock | None = None
        self._is_only_writer = False  # known to be
        self._is_prepared = False
        self._is_tidied = False
        self._in_flight: dict[str, int] = {}  # name -> how many saves
        self._own: dict[int, float | None] = {}  # step -> metric, of what this object has committed
        self._metrics: dict[tuple[str, str], float | None] = {}  # of (name, identity)
        self._sound: int | None = None  # a step that a search has found so
        self._wishes: dict[int, bool] = {}  # step -> protected: of what is not there yet, or is being saved
        self.background = Background(f"checkpoints in {folder.path}")
        self._deletions = Deletions(folder, self.background)

    # --- a save

    def announce(self, step: int, metric: float | None, *, durable: bool) -> Announced:
        """Makes the folder and takes the lock, the first time; writes the facts. Ends in :meth:`committed` or
        :meth:`failed`.

        Raises:
            CheckpointDirectoryInUseError, OSError: the folder is as before.
        """
        self.prepare(durable=durable)
        name = self._pattern.name_of(step)
        with self._lock:
            self._in_flight[name] = self._in_flight.get(name, 0) + 1
        try:
            version = self._folder.version(name)
            before = NOTHING_KNOWN if version is None else read_facts(self._folder, name)
            new = Facts.of_now(metric, protected=self._wishes.get(step, before.protected))
            replaces = None if version is None else (version, before)
            self._folder.write(name + facts.SUFFIX, facts.encoded(step, new, replaces))
        except BaseException:
            self._no_longer_in_flight(name)
            raise
        return Announced(step, name, self._folder.path_of(name), new, version, before)

    def prepare(self, *, durable: bool = True) -> None:
        with self._lock:
            if self._is_prepared:
                return
            self._folder.create(durable=durable)
            if self._folder.is_local and not self._allow_other_writers:
                lock = WriterLock(self._folder.path)
                self._is_only_writer = lock.acquire()
                self._writer_lock = lock
            self._is_prepared = True

    def failed(self, announced: Announced) -> None:
        """The checkpoint is not there, or not known to survive a power loss. Never an error: facts without a checkpoint
        are in nobody's way."""
        with contextlib.suppress(OSError):
            name = announced.name
            with self._lock:
                is_alone = self._in_flight.get(name) == 1
            if is_alone and self._folder.version(name) == announced.version_before:
                if announced.version_before is None or announced.facts_before == NOTHING_KNOWN:
                    self._folder.remove(name + facts.SUFFIX)
                else:
                    self._write_facts(announced.step, announced.facts_before)
        self._no_longer_in_flight(announced.name)

    def committed(self, announced: Announced, *, durable: bool, sha256: Callable[[], str] | None = None) -> None:
        """The checkpoint is there: notes what could not be known before, and puts the folder in order. What cannot be
        done becomes a warning.

        Args:
            sha256: of the file's bytes, in hex, to be noted; may raise OSError.
        """
        try:
            self._write_completed(announced, sha256, durable=durable)
        finally:
            with self._lock:
                self._no_longer_in_flight(announced.name)
                self._own[announced.step] = announced.facts.metric
                self._finder.damaged.pop(announced.name, None)
        with self._lock:
            self._tidy(announced.step)

    def _write_completed(self, announced: Announced, sha256: Callable[[], str] | None, *, durable: bool) -> None:
        is_changed = False
        try:
            completed = self._completed(announced, sha256)
            is_changed = completed != announced.facts
            if is_changed:
                self._write_facts(announced.step, completed)
        except OSError as e:
            warn(f"{self._facts_shown(announced)}: could not be written: {e.strerror or e}")
        if durable and self._folder.is_local:
            self.background.run(lambda: self._sync_facts(announced, also_name=is_changed))

    def _facts_shown(self, announced: Announced) -> str:
        return self._folder.shown(announced.name + facts.SUFFIX)

    def _sync_facts(self, announced: Announced, *, also_name: bool) -> None:
        """Not before the checkpoint, and not in the call that saves it: a flush of a file of one block takes as long as
        one of the checkpoint, and without its facts a checkpoint is as good."""
        try:
            self._folder.sync(announced.name + facts.SUFFIX, also_name=also_name)
        except FileNotFoundError:  # it has been deleted since
            pass
        except OSError as e:
            warn(f"{self._facts_shown(announced)}: may not survive a power loss: {e.strerror or e}")

    def read_sha256(self, announced: Announced) -> str:
        """Of what has not been hashed while it was written."""
        return digest_of(self._folder, announced.name)

    def _completed(self, announced: Announced, sha256: Callable[[], str] | None) -> Facts:
        known = announced.facts
        if sha256 is not None:
            known = dataclasses.replace(known, sha256=sha256())
        with self._lock:
            return dataclasses.replace(known, protected=self._wishes.pop(announced.step, known.protected))

    def _write_facts(self, step: int, known: Facts) -> None:
        self._folder.write(self._pattern.name_of(step) + facts.SUFFIX, facts.encoded(step, known))

    def _no_longer_in_flight(self, name: str) -> None:
        with self._lock:
            self._in_flight[name] = self._in_flight.get(name, 0) - 1
            if self._in_flight[name] <= 0:
                del self._in_flight[name]

    # --- order

    def _tidy(self, step: int) -> None:
        """Cleans up after processes that were killed, sets the links, deletes what no rule keeps."""
        if self._is_tidied and self._rules.keep_all and not self._has_links:
            return
        try:
            there = survey(self._folder, self._pattern)
            self._remove_leftovers(there, self._pattern.name_of(step))
            is_first, self._is_tidied = not self._is_tidied, True
            kept, going = self._superfluous(there)
            self._delete(there, self._let_go_by_links(there, kept, going))
            if is_first:
                self._warn_of_newer(there, step)
        except OSError as e:
            warn(f"{self._folder.path}: could not be put in order after the save: {e.strerror or e}")

    def _superfluous(self, there: Survey) -> tuple[list[Kept], list[int]]:
        """What is there, and the steps that the rules do not keep."""
        kept, unknown = self._described(there)
        spared = unknown.union(step for step, wanted in self._wishes.items() if wanted)
        return kept, superfluous(kept, self._rules, spared)

    def _described(self, there: Survey) -> tuple[list[Kept], set[int]]:
        """What the rules ask for, and the steps of which that cannot be read now."""
        kept, unknown = [], set()
        for step, listed in there.checkpoints.items():
            if listed.kind == "other":
                continue
            metric = None
            try:
                metric = self._metric(step, listed)
            except OSError:
                unknown.add(step)
            is_proven = step in self._own or step == self._sound
            kept.append(Kept(step, metric, self._finder.is_damaged(listed), is_proven))
        return kept, unknown

    def _metric(self, step: int, listed: Listed) -> float | None:
        if self._rules.best is None:
            return None
        if step in self._own:
            return self._own[step]
        key = (listed.name, listed.identity)
        if key not in self._metrics:
            self._metrics[key] = read_facts(self._folder, listed.name).metric
        return self._metrics[key]

    def _let_go_by_links(
        self, there: Survey, kept: list[Kept], going: list[int], *, dry_run: bool = False
    ) -> list[int]:
        """Has links lead to what stays: all of them where links are asked for, or else those that lead to what goes.

        Returns:
            The steps to which none leads then.
        """
        if not self._folder.is_local:
            return going
        held: set[str | None] = set()
        names = {there.checkpoints[step].name for step in going}
        for link, step in self._targets(kept, going).items():
            led_to = links.leads_to(self._folder.path, link)
            if step is None:
                held.add(led_to)
            elif (self._has_links or led_to in names) and not dry_run:
                try:
                    links.point(self._folder.path, link, there.checkpoints[step].name)
                except OSError as e:
                    warn(f"{self._folder.shown(link)}: the link could not be set: {e.strerror or e}")
                    held.add(led_to)
        return [step for step in going if there.checkpoints[step].name not in held]

    def _targets(self, kept: list[Kept], going: list[int]) -> dict[str, int | None]:
        """What each link should lead to when ``going`` are gone; None: nobody knows."""
        left = [each for each in kept if each.step not in set(going) and not each.is_damaged]
        best = [] if self._rules.best is None else ranked(left, self._rules.best)
        return {
            links.LATEST: max((each.step for each in left), default=None),
            links.BEST: best[0].step if best else None,
        }

    def _remove_leftovers(self, there: Survey, fresh: str) -> None:
        temporaries = [name for name, target in there.temporaries.items() if target not in self._in_flight]
        self._folder.remove_leftovers(temporaries, fresh=None if self._is_only_writer else fresh)
        names = {listed.name for listed in there.checkpoints.values()}
        for name in there.facts:
            checkpoint = name.removesuffix(facts.SUFFIX)
            if checkpoint in names or checkpoint in self._in_flight:
                continue
            with contextlib.suppress(OSError):
                is_nobodys = self._is_only_writer or self._is_old(name)
                if is_nobodys and self._folder.version(checkpoint) is None:  # a signal handler may have saved it
                    self._folder.remove(name)

    def _is_old(self, name: str) -> bool:
        found = self._folder.nbytes_and_time(name)
        return found is not None and found[1] is not None and time.time() - found[1] > _FOREIGN_FACTS_SECONDS

    def _warn_of_newer(self, there: Survey, step: int) -> None:
        newer = [
            each
            for each, listed in there.checkpoints.items()
            if each > step
            and each not in self._own
            and listed.name not in self._in_flight  # of an asynchronous save that ended first
            and not self._finder.is_damaged(listed)
        ]
        if newer and not self._allow_other_writers:
            warn(
                f"{self._folder.path}: step {step} was saved beside step {newer[-1]}, which is newer by its number and "
                "stays what latest() finds; discard_after(step) deletes the checkpoints of an abandoned run"
            )

    def _delete(self, there: Survey, steps: list[int]) -> None:
        for step in steps:
            name = there.checkpoints[step].name
            try:
                if self._may_go(step):
                    self._deletions.delete(name)
            except OSError as e:
                warn(f"{self._folder.shown(name)}: could not be deleted: {e.strerror or e}")

    def _may_go(self, step: int) -> bool:
        """Asked just before a deletion: others may have protected it, and a signal handler saved it again."""
        name = self._pattern.name_of(step)
        with self._lock:
            newest_proven = max(self._own, default=self._sound)
            if name in self._in_flight or self._wishes.get(step) or step == newest_proven:
                return False
        return not read_facts(self._folder, name).protected

    # --- wishes

    def protect(self, step: int, wanted: bool) -> None:
        """
        Raises:
            OSError: what is there could not be changed.
        """
        name = self._pattern.name_of(step)
        with self._lock:
            self._wishes[step] = wanted
            if name in self._in_flight or self._folder.version(name) is None:
                return
            known = read_facts(self._folder, name)
            if known.protected != wanted:
                self._write_facts(step, dataclasses.replace(known, protected=wanted))
                self._folder.sync(name + facts.SUFFIX, also_name=True)
            del self._wishes[step]

    def prune(self, sound: int, *, dry_run: bool) -> list[int]:
        """Deletes what no rule keeps; the steps, also of what cannot be deleted.

        Args:
            sound: a step that was found to be.
            dry_run: only says what would be deleted.

        Raises:
            CheckpointDirectoryInUseError, OSError: nothing has been deleted.
        """
        if not dry_run:
            self.prepare()
        with self._lock:
            self._sound = sound
            there = survey(self._folder, self._pattern)
            kept, going = self._superfluous(there)
            going = [step for step in going if self._may_go(step)]
            going = self._let_go_by_links(there, kept, going, dry_run=dry_run)
            if not dry_run:
                self._delete(there, going)
            return going

    def discard_after(self, step: int) -> list[int]:
        """The steps that were deleted: the newest first, so that what is left at any moment is a run up to some step.

        Raises:
            StateDictIOError: one of them is being saved; nothing has been deleted.
            OSError: one could not be deleted.
        """
        self.prepare()
        gone = []
        with self._lock:
            there = survey(self._folder, self._pattern)
            going = [each for each, listed in there.checkpoints.items() if each > step and listed.kind != "other"]
            for each in going:
                if (name := there.checkpoints[each].name) in self._in_flight:
                    raise StateDictIOError(f"{self._folder.shown(name)}: is being saved; wait() first")
            self._turn_links(there, going)
            for each in reversed(going):
                name = there.checkpoints[each].name
                self._folder.remove(name)
                self._folder.remove(name + facts.SUFFIX)
                self._own.pop(each, None)
                gone.append(each)
        return gone

    def _turn_links(self, there: Survey, going: list[int]) -> None:
        """Away from what goes, whatever becomes of the links."""
        if not self._folder.is_local:
            return
        names = {there.checkpoints[step].name for step in going}
        for link, step in self._targets(self._described(there)[0], going).items():
            if links.leads_to(self._folder.path, link) not in names:
                continue
            if step is None:
                links.remove(self._folder.path, link)
            else:
                links.point(self._folder.path, link, there.checkpoints[step].name)

    # --- the end

    def close(self) -> None:
        with self._lock:
            if self._writer_lock is not None:
                self._writer_lock.release()
            self._writer_lock, self._is_prepared, self._is_only_writer = None, False, False

    def may_be_waited_for(self) -> bool:
        """Whether this thread is in none of the calls that put the folder in order, below a signal handler."""
        return not self._lock.is_mine()

    def start_anew(self) -> None:
        """In a forked child: what its parent holds and does is not its own."""
        self._lock = ReentrantLock()
        if self._writer_lock is not None:
            self._writer_lock.forget()
        self._writer_lock, self._is_prepared, self._is_only_writer = None, False, False
        self._in_flight.clear()
        self._deletions.start_anew()
        self.background.start_anew()


def warn(message: str, *, stacklevel: int = 3) -> None:
    warnings.warn(message, CheckpointDirectoryWarning, stacklevel=stacklevel)
