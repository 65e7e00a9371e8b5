"""Atomic, durable replacement of a file: whoever looks, at whatever instant, finds the old file or the new one, whole.

Both backends write through this. Order on the device: write, fsync, close, rename, fsync of the directory. The
temporary lies in the target's directory, because a rename is atomic within one file system only.

Python, and once: these are some ten system calls a save, whatever its size, so C++ has nothing to win here, and what a
fault-injection test shows of one backend's commit it shows of the other's. csrc/file begins at an open descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import time
from collections.abc import Callable
from types import TracebackType

from ..system import locks
from ..system.descriptors import NOFOLLOW, NOT_IMPLEMENTED, sync
from . import leftovers
from .targets import FileTarget
from .temporary_names import TemporaryNames

_MAX_NAMES = 100  # then it is no chance: the file system says of every name that it is taken
# A directory that takes no new names, or not such as ours.
_MAY_REFUSE_NAMES = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, *NOT_IMPLEMENTED}
# Errors of a rename also tell that the old file belongs to another user (in a sticky directory), is a mount point, or
# that the file system cannot rename.
_MAY_REFUSE_RENAME = {*_MAY_REFUSE_NAMES, errno.EBUSY, errno.EXDEV}


class Replacement:
    """A temporary that becomes ``target`` on :meth:`commit` and vanishes otherwise.

    Use as a context manager, from one thread. ``fd`` is the temporary's descriptor, open for writing at offset 0.

    Args:
        target: what to replace; stays open.
        durable: fsync the file and its directory.
        is_shared: others open the temporary and write into it too, through ``paths``.
        for_torch: torch does. The temporary gets a name after which torch names the archive right, where such a name is
            short enough. It does not begin with a dot then.
    """

    fd = -1
    _temporary = ""
    is_refused = False  #: it is the place that takes no replacement; what was raised says how it can be written
    was_refused_at_the_end = False  #: only after everything had been written

    def __init__(self, target: FileTarget, *, durable: bool, is_shared: bool = False, for_torch: bool = False) -> None:
        self.target = target
        self._durable = durable
        self._directory = target.directory
        self._names = TemporaryNames(target.name, target.archive_name)
        self._for_torch = for_torch and self._names.can_name_archive
        self._is_shared = is_shared or self._for_torch
        self._process = os.getpid()

    @property
    def paths(self) -> list[str]:
        """The temporary's, for other processes that write into it: as :meth:`OpenDirectory.paths_of`."""
        return self._directory.paths_of(self._temporary)

    @property
    def paths_for_torch(self) -> list[str]:
        """As :attr:`InPlace.paths_for_torch`."""
        return [self._directory.path_of(self._temporary), *self.paths]

    def __enter__(self) -> Replacement:
        try:  # a signal's exception can come up in any of the calls within
            self._create()
            leftovers.remove_leftovers(self._directory, self._names, self._temporary)
        except BaseException as e:
            self.abandon()
            if isinstance(e, OSError) and e.errno in _MAY_REFUSE_NAMES:
                self._refuse(e, at_the_end=False)
            self._name_target_in(e)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, OSError) and error.errno is not None and self._is_ours(error.filename):
                error.filename = self.target.given
        finally:
            self.abandon()

    def __del__(self) -> None:
        self.abandon()  # for a signal's exception that came up on the way into __exit__

    def open_to_read(self) -> int:
        """Another descriptor, for what has been written."""
        return self._directory.open(self._temporary, os.O_RDONLY | NOFOLLOW)

    def start_again(self) -> None:
        """Goes on with an empty temporary."""
        self.abandon()
        try:
            self._create()
        except OSError as e:
            self._name_target_in(e)
            raise

    def commit(
        self, is_superseded: Callable[[], bool] = lambda: False, before: Callable[[], None] = lambda: None
    ) -> None:
        """Puts the temporary in the target's place, unless ``is_superseded``, which may wait and is asked last of all;
        ``before`` is called then.

        On an error the target is untouched, unless it is the last fsync that fails: then the new file is there, and
        what may not survive a power loss is its name."""
        began = time.monotonic()
        try:
            self._finish()
            if is_superseded():
                return
            if time.monotonic() - began > leftovers.YOUNG_SECONDS / 2:
                leftovers.renew(self.fd)
            self._close()
            if is_superseded():  # by a signal's handler
                return
            before()
            self._move(self.target.name)
            if self._durable:
                self._directory.sync()
        except OSError as e:
            self._name_target_in(e)
            raise

    def finish(self) -> None:
        """Makes the temporary what it is to be, for :meth:`move_to`; it stays open, and locked."""
        try:
            self._finish()
        except OSError as e:
            self._name_target_in(e)
            raise

    def move_to(self, name: str) -> None:
        """Puts the finished temporary under any name of the directory, whose names are for the caller to flush."""
        try:
            leftovers.renew(self.fd)
            self._close()
            self._move(name)
        except OSError as e:
            self._name_target_in(e)
            raise

    def _finish(self) -> None:
        self._take_over_ownership()
        if self._durable:
            sync(self.fd)

    def _close(self) -> None:
        # Before the rename: close can report a write error (NFS, quota), and some network mounts refuse to rename an
        # open file.
        fd, self.fd = self.fd, -1
        os.close(fd)

    def _move(self, name: str) -> None:
        try:
            self._directory.move(self._temporary, name)
        except OSError as e:
            if e.errno in _MAY_REFUSE_RENAME:
                self._refuse(e, at_the_end=True)
            raise
        self._temporary = ""

    def _refuse(self, error: OSError, *, at_the_end: bool) -> None:
        self.is_refused, self.was_refused_at_the_end = True, at_the_end
        if at_the_end and os.name == "nt" and error.errno in (errno.EACCES, errno.EPERM):
            error.strerror = (
                f"{error.strerror}: Windows replaces no file that is open or mapped (torch.load(mmap=True), "
                "open_checkpoint, another program); close it, or pass atomic=False (on the command line: --in-place), "
                "which writes into the file itself"
            )
            error.args = (error.errno, error.strerror)
        elif at_the_end or self.target.existing is not None:  # for a new file atomic=False would not help
            error.strerror = (
                f"{error.strerror}: the file cannot be replaced here; atomic=False (on the command line: --in-place) "
                "writes into the file itself"
            )
            error.args = (error.errno, error.strerror)  # which a pickled error is made of, on its way between ranks

    def _create(self) -> None:
        existing = self.target.existing
        # A new file's mode is 0666 less the umask, which open() applies. What replaces a file is its owner's alone
        # until it has that file's group.
        mode = 0o666 if existing is None else stat.S_IMODE(existing.st_mode) & 0o600
        if self._is_shared:
            mode |= stat.S_IWUSR  # it is opened again
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW
        for attempt in range(1, _MAX_NAMES + 1):
            self._temporary = self._names.new(for_torch=self._for_torch)
            try:
                self.fd = self._directory.open(self._temporary, flags, mode)
                if locks.hold(self.fd) and self._is_shared and not self._others_can_write():
                    locks.let_go(self.fd)
                return
            except FileExistsError:
                self._temporary = ""  # another's: not to be removed
                if attempt == _MAX_NAMES:
                    raise

    def _others_can_write(self) -> bool:
        """SMB's locks keep all other descriptors from writing (man 2 flock)."""
        try:
            with io.FileIO(self._temporary, "w", opener=self._open_again) as file:  # closes whatever happens
                return file.write(b"\0") == 1
        except OSError:
            return False

    def _open_again(self, name: str, _flags: int) -> int:
        return self._directory.open(name, os.O_WRONLY | NOFOLLOW)

    def _take_over_ownership(self) -> None:
        existing = self.target.existing
        if existing is None or not hasattr(os, "fchown"):  # Windows: a file of ours, with the directory's rights
            return
        ours, user, group = os.fstat(self.fd), existing.st_uid, existing.st_gid
        mode = stat.S_IMODE(existing.st_mode)
        if (ours.st_uid, ours.st_gid) != (user, group) and not _change_owner(self.fd, user, group):
            # A file of ours then, like any editor's; in the old one's group if we are in it.
            mode &= 0o777
            if ours.st_gid != group and not _change_owner(self.fd, -1, group):
                # What the old group might do is not for ours, which may be larger: no more than everybody may.
                mode &= 0o707 | (mode & 0o007) << 3
        if stat.S_IMODE(ours.st_mode) != mode:
            _change_mode(self.fd, stat.S_IMODE(ours.st_mode), mode)

    def abandon(self) -> None:
        """Ends the replacement; the temporary goes. Again, or after the commit: does nothing."""
        # The second step also if a signal's exception ends the first. Between taking a descriptor and closing it there
        # is no call, and so no look for signals. Nothing more depends on the descriptor: errors do not matter.
        try:
            if self.fd >= 0:
                fd, self.fd = self.fd, -1
                try:  # noqa: SIM105
                    os.close(fd)
                except OSError:
                    pass
        finally:
            if self._temporary:
                self._remove_temporary()
                self._temporary = ""

    def _is_ours(self, filename: object) -> bool:
        """Whether an error's filename says nothing, or the temporary's name, which the caller has never heard of."""
        if filename is None:
            return True
        return self._temporary != "" and self._temporary in str(filename)

    def _remove_temporary(self) -> None:
        if os.getpid() != self._process or self._directory.is_closed:  # a child that was forked in the middle
            return
        try:
            self._directory.remove_file(self._temporary)
        except OSError:  # it stays then, but takes no room
            with contextlib.suppress(OSError):
                self._directory.empty_file(self._temporary)

    def _name_target_in(self, error: BaseException) -> None:
        """System errors carry the path that the caller gave, not the temporary's."""
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = self.target.given
            if error.filename2 is not None:
                del error.filename2  # None would be shown


def _change_owner(fd: int, user: int, group: int) -> bool:
    """False where that is not ours to do; EINVAL and EOVERFLOW are the answers about users that this container does not
    know."""
    try:
        os.fchown(fd, user, group)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.EINVAL, errno.EOVERFLOW, *NOT_IMPLEMENTED):
            raise
        return False
    return True


def _change_mode(fd: int, current: int, mode: int) -> None:
    try:
        os.fchmod(fd, mode)
    except OSError as e:
        # It is our own file: this file system changes no modes. Fewer rights will do, more will not.
        if e.errno not in (errno.EPERM, *NOT_IMPLEMENTED) or current & ~mode:
            raise
