"""``NAME.sha256``, the file beside a saved one that holds its SHA-256 as ``sha256sum -c`` wants it.

It is never there for another file than the one beside it: the old one is removed before the file is replaced, and the
new one comes after. A saver that dies in between leaves a good file without a sum. A save for which no sum is wanted
removes the old one too, if it is nothing but that: what else may be called so is not ours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..system.descriptors import NOFOLLOW, NOT_IMPLEMENTED, read_at, write_all
from ..system.file_digest import SUFFIX
from .places import write_file
from .targets import FileTarget, URLTarget

if TYPE_CHECKING:
    from ..remote.stores import Place

_MAX_NBYTES = 1 << 20
# The answers about a name that cannot be there, or is not for us to read.
_NOT_OURS = {errno.ENAMETOOLONG, errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP, *NOT_IMPLEMENTED}


class Sidecar:
    """Of a file that is saved.

    Args:
        durable: flush it, and its name, to the device.
        atomic: as of :func:`~statedict_io.writing.places.write_file`.
        is_wanted: a new one is to take its place.
        is_replaced: whether a file of that name goes with the target; None: the target alone does.
    """

    def __init__(
        self,
        target: FileTarget,
        *,
        durable: bool,
        atomic: bool | None = True,
        is_wanted: bool,
        is_replaced: Callable[[str], bool] | None = None,
    ) -> None:
        self._target = target
        self._durable = durable
        self._atomic = atomic
        self._is_wanted = is_wanted
        self._is_replaced = (lambda name: name == target.name) if is_replaced is None else is_replaced

    @property
    def name(self) -> str:
        return self._target.name + SUFFIX

    def remove(self) -> None:
        """Before the file that it is of goes; again: does nothing.

        Raises:
            OSError: says what it is about.
        """
        if not self._is_wanted and not self._is_outdated():
            return
        directory = self._target.directory
        try:
            directory.remove_file(self.name)
            if self._durable:
                directory.sync()
        except FileNotFoundError:
            pass
        except OSError as e:
            e.strerror = f"{e.strerror}: its sidecar {self.name!r} cannot be removed, which would not fit the new file"
            e.args = (e.errno, e.strerror)
            raise

    def _is_outdated(self) -> bool:
        """Whether it is there, and consists of sums of what is about to go. One call of the system where it is not."""
        directory = self._target.directory
        try:
            found = directory.look_at(self.name)
            if found is None or not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_NBYTES:
                return False
            fd = directory.open(self.name, os.O_RDONLY | NOFOLLOW)
        except OSError as e:
            if e.errno in _NOT_OURS:
                return False
            raise
        try:
            from ..formats import sums

            return sums.is_all_about(sums.decoded(read_at(fd, _MAX_NBYTES, 0)), self._is_replaced)
        finally:
            os.close(fd)

    def write(self, hexdigest: str, is_superseded: Callable[[], bool]) -> None:
        self.write_sums([(self._target.name, hexdigest)], is_superseded)

    def write_sums(self, hexdigests: Iterable[tuple[str, str]], is_superseded: Callable[[], bool]) -> None:
        """When the file is there, unless a later call has put another one there since.

        Raises:
            OSError: with the sidecar's path.
        """
        from ..formats import sums

        directory, target = self._target.directory, self._target
        beside = FileTarget(target.given + SUFFIX, directory, self.name, target.archive_name, None)
        try:
            beside.existing = directory.look_at(self.name)
        except OSError as e:
            e.filename = beside.given
            raise
        write_file(
            beside,
            lambda file: write_all(file.fd, memoryview(sums.lines(hexdigests))),
            durable=self._durable,
            atomic=self._atomic,
            is_superseded=is_superseded,
        )


class StoredSidecar:
    """The same of an object in a store."""

    def __init__(self, target: URLTarget, *, is_wanted: bool) -> None:
        from ..remote.stores import Place

        place = target.place
        self._name = place.file_name
        self._place: Place = Place(place.url + SUFFIX, place.fs, place.path + SUFFIX)
        self._is_wanted = is_wanted

    def remove(self) -> None:
        from ..remote.stores import naming_errors

        if not self._is_wanted and not self._is_outdated():
            return

        with naming_errors(self._place.url), contextlib.suppress(FileNotFoundError):
            self._place.fs.rm_file(self._place.path)

    def _is_outdated(self) -> bool:
        """As of a file; one request where it is not there. Who may not read there keeps what there is."""
        try:
            data = self._place.fs.cat_file(self._place.path, start=0, end=_MAX_NBYTES)
        except (OSError, NotImplementedError):
            return False
        from ..formats import sums

        return sums.is_all_about(sums.decoded(data), lambda name: name == self._name)

    def write(self, hexdigest: str, is_superseded: Callable[[], bool]) -> None:
        from ..formats import sums
        from ..remote.uploads import open_upload

        content = sums.lines([(self._name, hexdigest)])
        with open_upload(self._place, len(content)) as upload:
            upload.write(memoryview(content))
            if not is_superseded():
                upload.commit()
