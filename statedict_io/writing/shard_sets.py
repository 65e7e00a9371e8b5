"""How a set of shards takes the place of another: the index is what decides.

Whoever looks, at whatever instant, finds an index that names the files of the old set or those of the new one, all of
them there and whole. Shards of sets of one size have the same names, so new ones cannot take their places while the old
index names them. Then the new shards get provisional names first, and the index names these; when it is in force they
get their names too, as second links to the same files, and the index that is to stay names those.

    1. every shard is written into a temporary of its own, and flushed
    2. the temporaries are moved to names that the index in force does not name
    3. an index that names them takes its place: from here on it is the new set
    4. where the names were provisional: the shards get theirs, an index that names these follows, provisional names go
    5. what else there is of earlier sets goes

Between the steps the directory is flushed, where the save is durable. A directory's lock keeps savers apart from step 2
on; the last one wins.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from ..backends.protocol import Content
from ..progress import ProgressCallback
from ..system import locks
from ..system.descriptors import NOFOLLOW, NOT_IMPLEMENTED, read_at, write_all
from ..system.directories import OpenDirectory
from ..system.file_digest import SUFFIX, FileDigest
from ..system.processes import in_forked_child
from . import leftovers, shards, temporary_names
from .places import write_content
from .replacement import Replacement
from .sidecar import Sidecar
from .targets import FileTarget

_MAX_INDEX_NBYTES = 256 << 20
_RANDOM_NBYTES = 6
_being_placed: dict[str, int] = {}  # sets of this process, each with the thread that puts its files in place
#: of a file system that gives a file one name only
_CANNOT_LINK = {errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EACCES, *NOT_IMPLEMENTED}


class ShardSet:
    """A set in a directory; serves one save.

    Args:
        directory: stays open.
        stem: with which all names begin: ``model``.
        durable: flush files and names to the device.
        is_hashed: :attr:`sums` are wanted, and a sidecar with them.
    """

    def __init__(self, directory: OpenDirectory, stem: str, *, durable: bool, is_hashed: bool = False) -> None:
        self._directory = directory
        self._stem = stem
        self._durable = durable
        self._is_hashed = is_hashed
        self.sums: dict[str, str] = {}  #: of each file of the set, SHA-256 in hex; known when it has been written

    def write(
        self,
        contents: Sequence[Content],
        index_of: Callable[[Sequence[str]], bytes],
        progress: ProgressCallback | None,
        is_superseded: Callable[[], bool],
    ) -> None:
        """
        Args:
            contents: of the shards; a single one is a file without an index.
            index_of: the index, for the names of the shards.
            is_superseded: asked before anything changes.

        Raises:
            OSError: what the system reported, with a path. The old set or the new one is there.
        """
        names = shards.names_of(self._stem, len(contents))
        total = sum(content.nbytes or 0 for content in contents)
        with self._naming(), contextlib.ExitStack() as unfinished:
            finished = []
            done = 0
            for name, content in zip(names, contents, strict=True):
                file = unfinished.enter_context(Replacement(self._target(name), durable=self._durable))
                report = None if progress is None else _from(progress, done, total)
                digest = FileDigest() if self._is_hashed else None
                write_content(content, file, durable=self._durable, progress=report, digest=digest)
                file.finish()
                if digest is not None:
                    self.sums[name] = digest.hexdigest()
                finished.append(file)
                done += content.nbytes or 0
            if is_superseded():
                return
            with self._alone():
                # What readers begin with, and the sidecar is named after.
                entry = names[0] if len(names) == 1 else self._index_name
                self._remove_sums_of({*names, entry} - ({entry} if self._is_hashed else set()))
                sidecar = self._sidecar(entry, is_wanted=self._is_hashed)
                sidecar.remove()
                if len(finished) == 1:
                    finished[0].move_to(names[0])
                    self._flush()
                else:
                    self._take_place(finished, names, index_of)
                    if self._is_hashed:
                        self.sums[entry] = hashlib.sha256(index_of(names)).hexdigest()
                self._remove_others({*names, entry})
                if self._is_hashed:
                    sidecar.write_sums(self.sums.items(), lambda: False)

    def _take_place(
        self, finished: Sequence[Replacement], names: Sequence[str], index_of: Callable[[Sequence[str]], bytes]
    ) -> None:
        if self._in_force().isdisjoint(names):
            self._place(finished, names, index_of(names))
            return
        token = os.urandom(_RANDOM_NBYTES).hex()
        provisional = [f"{name.removesuffix(shards.SUFFIX)}.{token}{shards.SUFFIX}" for name in names]
        self._place(finished, provisional, index_of(provisional))
        if not self._link(provisional, names):
            # Without an index nobody takes a mixture for a set.
            self._directory.remove_file(self._index_name)
            self._flush()
            for name, new_name in zip(provisional, names, strict=True):
                self._directory.move(name, new_name)
        self._flush()
        self._write_index(index_of(names))
        for name in provisional:
            with contextlib.suppress(OSError):
                self._directory.remove_file(name)

    def _place(self, finished: Sequence[Replacement], names: Sequence[str], index: bytes) -> None:
        """Puts new shards under names that are not in use, and the index in force."""
        placed = []
        try:
            for file, name in zip(finished, names, strict=True):
                placed.append(name)
                file.move_to(name)
            self._flush()
            self._write_index(index)
        except BaseException:
            # Not where it is in force, or may be: what went wrong may have happened all the same.
            with contextlib.suppress(OSError):
                if self._index() != index:
                    for name in placed:
                        with contextlib.suppress(OSError):
                            self._directory.remove_file(name)
            raise

    def _link(self, names: Sequence[str], new_names: Sequence[str]) -> bool:
        """Gives each file a second name, in the place of what has it; False where files have one name only."""
        for name, new_name in zip(names, new_names, strict=True):
            temporary = temporary_names.TemporaryNames(new_name, self._stem).new(for_torch=False)
            try:
                self._directory.link(name, temporary)
            except OSError as e:
                if e.errno in _CANNOT_LINK:
                    return False
                raise
            try:
                self._directory.move(temporary, new_name)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._directory.remove_file(temporary)
                raise
        return True

    def _write_index(self, index: bytes) -> None:
        with Replacement(self._target(self._index_name), durable=self._durable) as file:
            write_all(file.fd, memoryview(index))
            file.commit()

    def _remove_others(self, stays: set[str]) -> None:
        """What is left of earlier sets, those that a killed saver has begun included."""
        others = [name for name in self._directory.names() if shards.is_of_set(self._stem, name) and name not in stays]
        # What readers begin with goes first, and has to go: they would find the old weights, or a part of them.
        for entry in (self._index_name, self._stem + shards.SUFFIX):
            if entry in others:
                self._sidecar(entry).remove()
                self._directory.remove_file(entry)
                self._flush()
        for name in others:
            with contextlib.suppress(OSError):
                if name.endswith(SUFFIX):
                    self._sidecar(name.removesuffix(SUFFIX)).remove()
                else:
                    self._directory.remove_file(name)
        for name in self._directory.names():
            target = temporary_names.target_of(name)
            if target is not None and shards.is_of_set(self._stem, target):
                leftovers.remove_if_left_over(self._directory, name, min(stays))

    def _remove_sums_of(self, names: set[str]) -> None:
        """Before other files get these names."""
        for name in self._directory.names():
            if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in names:
                self._sidecar(name.removesuffix(SUFFIX)).remove()

    def _sidecar(self, name: str, *, is_wanted: bool = False) -> Sidecar:
        return Sidecar(
            self._target(name),
            durable=self._durable,
            is_wanted=is_wanted,
            is_replaced=functools.partial(shards.is_of_set, self._stem),
        )

    def _in_force(self) -> set[str]:
        """The files that the index names; none where there is no index that can be read."""
        try:
            weight_map = json.loads(self._index() or b"null")["weight_map"]
            return {file for file in weight_map.values() if isinstance(file, str)}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return set()

    def _index(self) -> bytes | None:
        """None where there is none.

        Raises:
            OSError: it cannot be read.
        """
        try:
            fd = self._directory.open(self._index_name, os.O_RDONLY | NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            return read_at(fd, min(os.fstat(fd).st_size, _MAX_INDEX_NBYTES), 0)
        finally:
            os.close(fd)

    @property
    def _index_name(self) -> str:
        return self._stem + shards.INDEX_SUFFIX

    def _target(self, name: str) -> FileTarget:
        directory = self._directory
        return FileTarget(self._path_of(name), directory, name, self._stem, directory.look_at(name))

    def _path_of(self, name: str) -> str:
        return os.path.join(self._directory.path, name)

    def _flush(self) -> None:
        if self._durable:
            self._directory.sync()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other saver of sets in the directory, where it can be locked.

        Raises:
            OSError: EBUSY: this thread is inside another one, which a signal handler has interrupted and which cannot
                go on before that returns.
        """
        fd, set_of = self._directory.fd, self._directory.identity_of(self._stem)
        me = threading.get_ident()
        if _being_placed.get(set_of) == me:
            said = "another save of this set, in this thread, is putting its files in place just now"
            raise OSError(errno.EBUSY, said, self._path_of(self._index_name))
        locked = fd >= 0 and locks.hold(fd, waits=True)
        try:
            _being_placed[set_of] = me
            yield
        finally:
            _being_placed.pop(set_of, None)
            if locked:
                locks.let_go(fd)

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """System errors carry the path of the index, unless they have one of a file that the caller knows."""
        try:
            yield
        except OSError as e:
            # Calls on names in the directory tell those alone, and calls on descriptors those or nothing.
            if e.errno is not None and not (isinstance(e.filename, str) and os.path.dirname(e.filename)):
                e.filename = self._path_of(self._index_name)
                if e.filename2 is not None:
                    del e.filename2
            raise


def _from(progress: ProgressCallback, start: int, total: int) -> ProgressCallback:
    return lambda done, _: progress(start + done, total)


in_forked_child(_being_placed.clear)
