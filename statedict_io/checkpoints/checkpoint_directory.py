"""``CheckpointDirectory``: saves into a directory, keeps what the rules say, finds the newest sound one. What it does
is in ``writer`` and ``finder``; how it is meant is in docs/checkpoint-directories.md."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

from ..errors import CorruptCheckpointError
from ..options import check_choice, check_flags
from ..system.file_digest import FileDigest
from ..system.processes import in_forked_child
from ..writing import async_saving, saving
from ..writing.pending import PendingSave
from .entry import SavedCheckpoint, SkippedCheckpoint
from .facts import checked_metric
from .finder import Finder, Ranking, newest_first
from .following import Followings
from .naming import DEFAULT, Pattern, checked_step
from .opening import open_folder
from .restoring import Loading, check_parts, restore_parts
from .retention import Direction, Rules
from .soundness import Verify, checked_level
from .stop_signals import StopSignals
from .writer import Announced, Writer, warn

_all: weakref.WeakSet[CheckpointDirectory] = weakref.WeakSet()


class CheckpointDirectory:
    """Checkpoints of a run, one file a step, and which of them are kept.

    Nothing is made or opened before the first call that needs it. Reading (``latest``, ``best``, ``restore``,
    iteration) writes nothing, and works while another process saves. Any thread may call it. As a context manager it is
    closed at the end of the block.

    Args:
        path: of the directory, which the first save makes; or a URL of fsspec (``str``).
        keep_last: how many of the newest steps are kept; None: all, or 1 where ``keep_every`` or ``keep_best`` is
            given.
        keep_every: steps that are multiples of it are kept.
        keep_best: how many with the best metric are kept.
        best: which metric is the best, ``"min"`` or ``"max"``.
        pattern: of the files' names: a format string with the field ``{step}``.
        links: whether symlinks ``latest`` and, with ``best``, ``best`` lead to checkpoints.
        allow_other_writers: whether other processes may save into the directory too.

    Raises:
        TypeError, ValueError: for rules, options and patterns that cannot be; names them.
        FileKindError: the pattern ends in ``.safetensors``.

    Example:
        >>> ckpts = sio.CheckpointDirectory("runs/7", keep_last=2, keep_best=1, best="min")
        >>> for step, loss in [(100, 0.5), (200, 0.3), (300, 0.4), (400, 0.6)]:
        ...     ckpts.save({"step": step, "model": model.state_dict()}, step=step, metric=loss)
        >>> [(found.step, found.metric) for found in ckpts]
        [(200, 0.3), (300, 0.4), (400, 0.6)]
        >>> ckpts.latest().load()["step"]
        400
        >>> ckpts.restore(model=model)
        400
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: int | None = None,
        best: Direction | None = None,
        pattern: str = DEFAULT,
        links: bool = False,
        allow_other_writers: bool = False,
    ) -> None:
        check_flags(links=links, allow_other_writers=allow_other_writers)
        self._rules = Rules(keep_last, keep_every, keep_best, best)
        self._pattern = Pattern(pattern)
        self._folder = open_folder(path)
        if links and not self._folder.is_local:
            raise ValueError(f"{self._folder.path}: links=True needs a file system, stores have no symlinks")
        self._finder = Finder(self._folder, self._pattern)
        self._writer = Writer(
            self._folder,
            self._pattern,
            self._rules,
            self._finder,
            has_links=links,
            allow_other_writers=allow_other_writers,
        )
        self._followings = Followings(self._writer.may_be_waited_for)
        self._stop_signals: list[StopSignals] = []
        self._should_stop = False
        _all.add(self)

    @property
    def path(self) -> str:
        """Absolute, or a URL without its password."""
        return self._folder.path

    def __repr__(self) -> str:
        return f"<CheckpointDirectory {self.path!r}>"

    # --- saving

    def save(
        self,
        state: object,
        step: int,
        metric: float | None = None,
        *,
        digest: str | None = None,
        storage: Literal["dcp"] | None = None,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        """Saves ``state`` as the checkpoint of ``step``, then deletes what the rules no longer keep.

        One of the same step is replaced. What fails after the checkpoint is there, such as a deletion, is a
        :class:`CheckpointDirectoryWarning`.

        Args:
            state: anything that :func:`save` takes.
            step: at least 0.
            metric: what ``best`` compares; NaN and None are never the best.
            digest: ``"sha256"`` notes the hash of the file's bytes, computed as they are written; with
                ``storage="dcp"`` they are read again for that.
            storage: ``"dcp"``: every rank writes its part, through a :class:`~statedict_io.dcp.SingleFileWriter`. A
                collective call; the first rank alone keeps the directory in order.
            process_group: of that call; None: the default group.
            options: of :func:`save`, with ``storage="dcp"`` of the writer.

        Raises:
            CheckpointDirectoryInUseError: somebody else saves into the directory.
            OSError: what the system reported; what was there before is there. Or an earlier :meth:`save_async` has
                failed with it and nobody has asked for its result: this save has not been started.
            Exception: what :func:`save` raises.
        """
        if _is_dcp(storage):
            from . import ranks

            def announce() -> tuple[Announced, bool]:
                self._followings.catch_up()
                return self._announce(step, metric, digest, options)

            ranks.save(self._writer, announce, state, process_group, digest, options)
            return
        self._followings.catch_up()
        self._save(state, step, metric, digest, options)

    def _save(
        self, state: object, step: int, metric: float | None, digest: str | None, options: dict[str, Any]
    ) -> None:
        announced, durable = self._announce(step, metric, digest, options)
        wanted = _noted(digest)
        try:
            saving.save_hashed(wanted, state, announced.path, **options)
        except BaseException:
            self._writer.failed(announced)
            raise
        self._writer.committed(announced, durable=durable, sha256=None if wanted is None else wanted.hexdigest)

    def save_async(
        self, state: object, step: int, metric: float | None = None, *, digest: str | None = None, **options: Any
    ) -> PendingSave:
        """As :meth:`save`, but returns as soon as the tensors may be changed. The rules are applied by a thread, when
        the checkpoint is there; the save is done when they are.

        Args:
            state, step, metric, digest: as for :meth:`save`.
            options: of :func:`save_async`.

        Returns:
            What to ask for the result. An error that nobody asks for is raised by the next save into this directory.

        Raises:
            Exception: what :meth:`save` and :func:`save_async` raise.
        """
        if "storage" in options:
            raise ValueError("save_async writes from one process; for many ranks there is save(storage='dcp')")
        self._followings.catch_up()
        announced, durable = self._announce(step, metric, digest, options)
        wanted = _noted(digest)
        try:
            saved = async_saving.save_hashed_async(wanted, state, announced.path, **options)
        except BaseException:
            self._writer.failed(announced)
            raise

        def follow(is_there: bool) -> None:
            if is_there:
                self._writer.committed(announced, durable=durable, sha256=None if wanted is None else wanted.hexdigest)
            else:
                self._writer.failed(announced)

        return self._followings.begin(saved, follow)

    def _announce(
        self, step: int, metric: float | None, digest: str | None, options: dict[str, Any]
    ) -> tuple[Announced, bool]:
        step, metric = checked_step(step), checked_metric(metric)
        if digest is not None:
            check_choice("digest", digest, ("sha256",))
        for name in options:
            if name.startswith("_"):
                raise TypeError(f"CheckpointDirectory saves in torch's zip format: {name} is not taken")
        durable = options.get("durable", True)
        check_flags(durable=durable)
        return self._writer.announce(step, metric, durable=bool(durable)), bool(durable)

    def protect(self, step: int, protected: bool = True) -> None:
        """Has no rule delete the checkpoint of ``step``, in this process or any other; with ``protected=False``, as any
        other again. It may be saved later.

        Raises:
            OSError: what is noted beside the checkpoint cannot be changed.
        """
        self._writer.protect(checked_step(step), protected)

    def prune(
        self,
        *,
        verify: Verify = "crc",
        backend: str = "auto",
        dry_run: bool = False,
    ) -> list[int]:
        """Applies the rules now, without a save. The newest sound checkpoint is looked for first, and stays.

        Args:
            verify, backend: how it is looked for: as for :meth:`latest`.
            dry_run: deletes nothing, and needs no right to.

        Returns:
            The steps that go.

        Raises:
            CorruptCheckpointError: none is sound; nothing has been deleted.
            CheckpointDirectoryInUseError: somebody else saves into the directory.
            OSError: as :meth:`latest`. Deletions that fail are warnings.
        """
        found = self.latest(verify=verify, backend=backend)
        if found is not None:
            return self._writer.prune(found.step, dry_run=dry_run)
        if self._finder.all():
            raise CorruptCheckpointError(f"{self.path}: none of its checkpoints is sound; nothing is deleted")
        return []

    def discard_after(self, step: int) -> list[int]:
        """Deletes every checkpoint newer than ``step``, also protected ones and such as are being read: for a run that
        goes back, and leaves what it did since.

        Returns:
            The steps that were deleted.

        Raises:
            StateDictIOError: one of them is being saved, or somebody else saves into the directory; nothing has been
                deleted.
            OSError: one could not be deleted; those above it have been.
        """
        return self._writer.discard_after(checked_step(step))

    # --- reading

    def __iter__(self) -> Iterator[SavedCheckpoint]:
        """What is there, in the order of the steps, sound or not."""
        return iter(self._finder.all())

    def latest(
        self,
        *,
        verify: Verify = "crc",
        backend: str = "auto",
        storage: Literal["dcp"] | None = None,
        process_group: Any = None,
    ) -> SavedCheckpoint | None:
        """The newest checkpoint that is sound; None where there is none.

        Those that are not are passed over: they are in the result's ``skipped``, and in one warning.

        Args:
            verify: ``"crc"`` reads the whole file; ``"digest"`` also compares the hash of its bytes, where ``save`` has
                noted one; ``"structure"`` reads its ends, and so finds torn and foreign files; ``False`` opens nothing.
            backend: as for :func:`verify`.
            storage: ``"dcp"``: the first rank looks, and all get its answer, or its error. A collective call.
            process_group: of that call; None: the default group.

        Raises:
            OSError: the directory cannot be listed, or a checkpoint cannot be read for a reason that says nothing
                about it, such as too many open files.
        """
        if _is_dcp(storage):
            from . import ranks

            def look() -> tuple[int, list[SkippedCheckpoint]] | None:
                found = self.latest(verify=verify, backend=backend)
                return None if found is None else (found.step, found.skipped)

            agreed = ranks.of_first(look, process_group)
            if agreed is None:
                return None
            return SavedCheckpoint(self._folder, self._pattern.name_of(agreed[0]), *agreed)
        return self._search(newest_first, verify, backend)

    def best(self, *, verify: Verify = "crc", backend: str = "auto") -> SavedCheckpoint | None:
        """The checkpoint with the best metric among those that are sound, the newest of equals; None where none has a
        metric. Otherwise as :meth:`latest`.

        Raises:
            ValueError: the directory was opened without ``best=``.
        """
        if self._rules.best is None:
            raise ValueError("which metric is the best? CheckpointDirectory(..., best='min') or best='max'")
        return self._search(self._finder.by_metric(self._rules.best), verify, backend)

    def _search(self, ranking: Ranking, verify: object, backend: str) -> SavedCheckpoint | None:
        level = checked_level(verify)
        skipped: list[SkippedCheckpoint] = []
        found = self._finder.first(ranking, self._finder.check(level, backend), skipped)
        self._warn_of(skipped, found and found[0])
        return found and found[0]

    def restore(
        self,
        *,
        step: int | None = None,
        verify: Verify = "crc",
        map_location: Any = "cpu",
        weights_only: bool = True,
        backend: str = "auto",
        storage: Literal["dcp"] | None = None,
        process_group: Any = None,
        **parts: Any,
    ) -> int | None:
        """Loads the newest sound checkpoint into ``parts``; its step, or None where there is none.

        Args:
            step: of the checkpoint to take instead.
            verify: as for :meth:`latest`; every file is read once, and checked meanwhile, but for ``"digest"``: that is
                a pass of its own.
            map_location, weights_only, backend: as for :func:`load`.
            storage: ``"dcp"``: all ranks load what the first one has found, each the whole of it. A collective call.
                States of which every rank has a part are read with :meth:`SavedCheckpoint.load_into`.
            process_group: of that call; None: the default group.
            parts: what has ``load_state_dict``, by its key in the saved dict: ``model=model, optimizer=optimizer``. A
                model may lack parameters that require no grad, as after :func:`trainable_state_dict`. Where the key is
                missing, ``opt`` stands for ``optimizer``, and ``model_state_dict`` for ``model``, as others save them.

        Raises:
            StateDictIOError: the checkpoint has nothing for one of ``parts``; none has been changed.
            CorruptCheckpointError: that of ``step`` is damaged.
            FileNotFoundError: there is none of ``step``.
            Exception: what :func:`load` and ``load_state_dict`` raise.
        """
        check_parts(parts)
        loading = Loading(self._finder, checked_level(verify), map_location, weights_only, backend)
        if not _is_dcp(storage):
            return self._restore(loading, step, parts)
        from . import ranks

        if step is None:
            agreed = self.latest(verify=verify, backend=backend, storage=storage, process_group=process_group)
            if agreed is None:
                return None
            step, loading = agreed.step, replace(loading, level=False)
        return ranks.in_all(lambda: self._restore(loading, step, parts), process_group)

    def _restore(self, loading: Loading, step: int | None, parts: dict[str, Any]) -> int | None:
        if step is not None:
            step = checked_step(step)
            entry = SavedCheckpoint(self._folder, self._pattern.name_of(step), step)
            state = loading.load(entry)
        else:
            skipped: list[SkippedCheckpoint] = []
            found = self._finder.first(newest_first, loading.load_if_sound, skipped)
            self._warn_of(skipped, found and found[0])
            if found is None:
                return None
            entry, state = found
        restore_parts(parts, state, self._folder.shown(self._pattern.name_of(entry.step)))
        return entry.step

    def _warn_of(self, skipped: list[SkippedCheckpoint], found: SavedCheckpoint | None) -> None:
        if skipped:
            taken = "there is no sound one" if found is None else f"step {found.step} is taken"
            reasons = "; ".join(each.reason for each in skipped)
            count = "1 checkpoint is" if len(skipped) == 1 else f"{len(skipped)} checkpoints are"
            warn(f"{self.path}: {count} passed over, {taken}: {reasons}", stacklevel=4)

    # --- being stopped

    def save_on_signal(self, *signals: int, state: Callable[[], tuple[int, object]] | None = None) -> None:
        """Has ``signals``, such as ``signal.SIGTERM``, set :attr:`should_stop` instead of ending the process. Handlers
        that were there are called too. To be called in the main thread; forked children have the old handlers.

        Args:
            state: returns (step, state) to save in the handler, for loops that may not come round in time. It is
                called between any two lines of the program, so also in the middle of ``optimizer.step()``. The save
                happens also where an earlier asynchronous one has failed.

        Raises:
            ValueError: no signal is given; or not in the main thread.
        """
        if not signals:
            raise ValueError("save_on_signal needs a signal, such as signal.SIGTERM")

        def act(directory: CheckpointDirectory) -> None:
            directory.request_stop()
            if state is not None:
                step, content = state()
                directory._save(content, step, None, None, {})

        self._stop_signals.append(StopSignals(signals, act, self))

    @property
    def should_stop(self) -> bool:
        """Whether a signal of :meth:`save_on_signal` has come, or :meth:`request_stop` was called. Of this process:
        ranks have to agree before they act on it."""
        return self._should_stop

    def request_stop(self) -> None:
        """Sets :attr:`should_stop`, for other reasons than a signal."""
        self._should_stop = True

    # --- the end

    def wait(self, timeout: float | None = None) -> None:
        """Returns when every save has ended and what goes has gone. Errors stay to be asked for.

        Args:
            timeout: in seconds; None: as long as it takes.

        Raises:
            TimeoutError: something still goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout

        def left() -> float | None:
            return None if deadline is None else max(deadline - time.monotonic(), 0.0)

        if not self._followings.wait(left()):
            raise TimeoutError(f"{self.path}: a save has not ended after {timeout} s")
        if not self._writer.background.wait(left()):
            raise TimeoutError(f"{self.path}: a deletion has not ended after {timeout} s")

    def close(self) -> None:
        """Waits as :meth:`wait` does, lets others save into the directory, and puts back the handlers of signals."""
        try:
            self.wait()
        finally:
            self._writer.close()
            for each in self._stop_signals:
                each.restore()
            self._stop_signals.clear()

    def __enter__(self) -> CheckpointDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_writer"):  # not where a rule was refused
            self._writer.close()

    def _start_anew(self) -> None:
        self._writer.start_anew()
        self._followings.start_anew()


def _noted(digest: str | None) -> FileDigest | None:
    """What :mod:`facts` keep beside the checkpoint, without a sidecar."""
    return None if digest is None else FileDigest(has_sidecar=False)


def _is_dcp(storage: str | None) -> bool:
    if storage is not None:
        check_choice("storage", storage, ("dcp",))
    return storage is not None


def _start_anew() -> None:
    for each in list(_all):
        each._start_anew()


def _close_all() -> None:
    for each in list(_all):
        each._writer.close()


in_forked_child(_start_anew)
atexit.register(_close_all)
