"""What a save does around the writing of its checkpoint.

The order is what makes it safe to be killed at any moment: the facts, the checkpoint, the links, then the deletions.
Only names count: no file says what is there, or which one is the newest.

Used from any thread, and by a signal handler in the middle of another call. The lock is held while the folder is put in
order after a commit, never while a checkpoint is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import threading
import time
import warnings
from dataclasses import dataclass

from ..errors import CheckpointDirectoryWarning, StateDictIOError
from . import facts, links
from .background import Background
from .deletion import Deletions
from .entry import read_facts
from .facts import NOTHING_KNOWN, Facts
from .finder import Finder
from .folder import Folder, Listed
from .naming import Pattern
from .retention import Kept, Rules, ranked, superfluous
from .survey import Survey, survey
from .writer_lock import WriterLock

# As of temporaries: whoever saves this long into a folder that he does not have for himself is gone.
_FOREIGN_FACTS_SECONDS = 24 * 3600
_HASHED_NBYTES = 1 << 20


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
        self._lock = threading.RLock()
        self._writer_lock: WriterLock | None = None
        self._is_only_writer = False  # known to be
        self._is_prepared = False
        self._is_tidied = False
        self._in_flight: dict[str, int] = {}  # name -> how many saves
        self._own: dict[int, float | None] = {}  # step -> metric, of what this object has committed
        self._metrics: dict[tuple[str, str], float | None] = {}  # of (name, identity)
        self._sound: int | None = None  # a step that a search has found so
        self._to_protect: set[int] = set()  # steps that are not there yet
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
            new = Facts.of_now(metric, protected=before.protected or step in self._to_protect)
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

    def committed(self, announced: Announced, *, durable: bool, digest: str | None = None) -> None:
        """The checkpoint is there: notes what could not be known before, and puts the folder in order. What cannot be
        done becomes a warning."""
        try:
            self._complete_facts(announced, digest)
        except OSError as e:
            warn(f"{announced.path}{facts.SUFFIX}: could not be written: {e.strerror or e}")
        if durable and self._folder.is_local:
            self.background.run(lambda: self._sync_facts(announced))
        with self._lock:
            self._no_longer_in_flight(announced.name)
            self._own[announced.step] = announced.facts.metric
            self._finder.damaged.pop(announced.name, None)
            self._tidy(announced.step)

    def _sync_facts(self, announced: Announced) -> None:
        """Not before the checkpoint, and not in the call that saves it: a flush of a file of one block takes as long as
        one of the checkpoint, and without its facts a checkpoint is as good."""
        try:
            self._folder.sync(announced.name + facts.SUFFIX)
        except FileNotFoundError:  # it has been deleted since
            pass
        except OSError as e:
            warn(f"{announced.path}{facts.SUFFIX}: may not survive a power loss: {e.strerror or e}")

    def _complete_facts(self, announced: Announced, digest: str | None) -> None:
        known = announced.facts
        if digest is not None:
            known = dataclasses.replace(known, sha256=self._sha256(announced.name))
        if announced.step in self._to_protect:
            self._to_protect.discard(announced.step)
            known = dataclasses.replace(known, protected=True)
        if known != announced.facts:
            self._write_facts(announced.step, known)

    def _sha256(self, name: str) -> str:
        total = hashlib.sha256()
        with self._folder.opened(name) as file:
            while data := file.read(_HASHED_NBYTES):
                total.update(data)
        return total.hexdigest()

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
            if not self._is_tidied:
                self._warn_of_newer(there, step)
            self._remove_leftovers(there, self._pattern.name_of(step))
            self._is_tidied = True
            kept, unknown = self._described(there)
            going = superfluous(kept, self._rules, unknown | self._to_protect)
            names = [there.checkpoints[each].name for each in going]
            if self._has_links:
                left = [each for each in kept if each.step not in set(going) and not each.is_damaged]
                in_use = self._linked(there, left)
                names = [name for name in names if name not in in_use]
            self._delete(names)
        except OSError as e:
            warn(f"{self._folder.path}: could not be put in order after the save: {e.strerror or e}")

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

    def _linked(self, there: Survey, left: list[Kept]) -> set[str]:
        """Sets the links; the names that links lead to which could not be set."""
        wanted = {links.LATEST: [each.step for each in left][-1:]}
        if self._rules.best is not None:
            wanted[links.BEST] = [each.step for each in ranked(left, self._rules.best)][:1]
        in_use = set()
        for link, steps in wanted.items():
            try:
                for step in steps:
                    links.point(self._folder.path, link, there.checkpoints[step].name)
            except OSError as e:
                warn(f"{self._folder.path_of(link)}: the link could not be set: {e.strerror or e}")
                in_use.add(links.leads_to(self._folder.path, link) or "")
        return in_use

    def _remove_leftovers(self, there: Survey, fresh: str) -> None:
        temporaries = [name for name, target in there.temporaries.items() if target not in self._in_flight]
        self._folder.remove_leftovers(temporaries, fresh=None if self._is_only_writer else fresh)
        names = {listed.name for listed in there.checkpoints.values()}
        for name in there.facts:
            checkpoint = name.removesuffix(facts.SUFFIX)
            if checkpoint in names or checkpoint in self._in_flight:
                continue
            with contextlib.suppress(OSError):
                if self._is_only_writer or self._is_old(name):
                    self._folder.remove(name)

    def _is_old(self, name: str) -> bool:
        found = self._folder.nbytes_and_time(name)
        return found is not None and found[1] is not None and time.time() - found[1] > _FOREIGN_FACTS_SECONDS

    def _warn_of_newer(self, there: Survey, step: int) -> None:
        newer = [
            each
            for each, listed in there.checkpoints.items()
            if each > step and each not in self._own and not self._finder.is_damaged(listed)
        ]
        if newer and not self._allow_other_writers:
            warn(
                f"{self._folder.path}: step {step} was saved beside step {newer[-1]}, which is newer by its number and "
                "stays what latest() finds; discard_after(step) deletes the checkpoints of an abandoned run"
            )

    def _delete(self, names: list[str]) -> None:
        for name in names:
            try:
                if self._may_go(name):
                    self._deletions.delete(name)
            except OSError as e:
                warn(f"{self._folder.path_of(name)}: could not be deleted: {e.strerror or e}")

    def _may_go(self, name: str) -> bool:
        """Asked just before a deletion: others may have protected it, and a signal handler saved it again."""
        step = self._pattern.step_of(name)
        with self._lock:
            newest_proven = max(self._own, default=self._sound)
            if name in self._in_flight or step in self._to_protect or step == newest_proven:
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
            (self._to_protect.add if wanted else self._to_protect.discard)(step)
            if name in self._in_flight or self._folder.version(name) is None:
                return
            known = read_facts(self._folder, name)
            if known.protected != wanted:
                self._write_facts(step, dataclasses.replace(known, protected=wanted))
                self._folder.sync(name + facts.SUFFIX)
            self._to_protect.discard(step)

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
            kept, unknown = self._described(there)
            going = superfluous(kept, self._rules, unknown | self._to_protect)
            going = [step for step in going if self._may_go(there.checkpoints[step].name)]
            if not dry_run:
                self._delete([there.checkpoints[step].name for step in going])
            return going

    def discard_after(self, step: int) -> list[int]:
        """The steps that were deleted: the newest first, so that what is left at any moment is a run up to some step.

        Raises:
            StateDictIOError: one of them is being saved.
            OSError: one could not be deleted.
        """
        self.prepare()
        gone = []
        with self._lock:
            there = survey(self._folder, self._pattern).checkpoints
            for each in sorted((each for each in there if each > step), reverse=True):
                name = there[each].name
                if name in self._in_flight:
                    raise StateDictIOError(f"{self._folder.path_of(name)}: is being saved")
                if there[each].kind != "other":
                    self._folder.remove(name)
                    self._folder.remove(name + facts.SUFFIX)
                    self._own.pop(each, None)
                    gone.append(each)
        return gone

    # --- the end

    def close(self) -> None:
        with self._lock:
            if self._writer_lock is not None:
                self._writer_lock.release()
            self._writer_lock, self._is_prepared, self._is_only_writer = None, False, False

    def start_anew(self) -> None:
        """In a forked child: what its parent holds and does is not its own."""
        self._lock = threading.RLock()
        if self._writer_lock is not None:
            self._writer_lock.forget()
        self._writer_lock, self._is_prepared, self._is_only_writer = None, False, False
        self._in_flight.clear()
        self._deletions.start_anew()
        self.background.start_anew()


def warn(message: str, *, stacklevel: int = 3) -> None:
    warnings.warn(message, CheckpointDirectoryWarning, stacklevel=stacklevel)
