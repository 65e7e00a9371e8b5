"""Writing into the file itself, where the place takes no replacement: see :class:`InPlace` for what that costs."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from types import TracebackType

from ..errors import StateDictIOError, refused_target
from ..system.descriptors import NOFOLLOW, sync
from ..system.processes import in_forked_child
from .targets import FileTarget

_being_written: dict[str, InPlace] = {}  # by the identity of its target; of this process


class InPlace:
    """The target itself, emptied and open for writing; used as a
    :class:`~statedict_io.writing.replacement.Replacement`.

    From the opening on the old file is lost, and who looks meanwhile sees a part of the new one. When the process dies
    or a write fails, what has been written until then stays; a file that was not there before is removed after an
    error. Mode, owner, hard links and attributes of an old file stay.

    Args:
        target: what to write; stays open.
        durable: fsync the file, and the directory of a new one.
    """

    fd = -1
    _has_created = False

    def __init__(self, target: FileTarget, *, durable: bool) -> None:
        self.target = target
        self._durable = durable
        self._process = os.getpid()

    @property
    def paths(self) -> list[str]:
        """For other processes that write into it: as :meth:`OpenDirectory.paths_of`."""
        return self.target.directory.paths_of(self.target.name)

    @property
    def paths_for_torch(self) -> list[str]:
        """For torch, which names the archive after the path that it opens; each may lead elsewhere by now."""
        return [self.target.given, self.target.directory.path_of(self.target.name)]

    def __enter__(self) -> InPlace:
        """Opens the file.

        Raises:
            OSError: what the system reported; EBUSY: another save of this process is writing the file in place.
            StateDictIOError: this process has the file mapped into its memory.
        """
        given = self.target.given
        try:
            if _being_written.setdefault(self.target.identity, self) is not self:
                raise OSError(errno.EBUSY, "another save of this process is writing the file in place just now", given)
            _refuse_mapped(self.target)
            self._has_created = self.target.directory.look_at(self.target.name) is None
            self._open()
        except OSError as e:
            self._end(failed=False)
            raise refused_target(e, given, f"open file failed with strerror: {e.strerror}") from None
        except BaseException:
            self._end(failed=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, self.target.name):
            error.filename = self.target.given
        self._end(failed=error is not None)

    def abandon(self) -> None:
        """Ends the writing; a file that was not there before goes. Again, or after the commit: does nothing."""
        self._end(failed=True)

    def open_to_read(self) -> int:
        """Another descriptor, for what has been written."""
        return self.target.directory.open(self.target.name, os.O_RDONLY | NOFOLLOW)

    def start_again(self) -> None:
        """Empties the file."""
        fd, self.fd = self.fd, -1
        os.close(fd)
        self._open()

    def commit(self) -> None:
        """Has it on the device, where that was asked for."""
        try:
            if self._durable:
                sync(self.fd)
            fd, self.fd = self.fd, -1
            os.close(fd)
            if self._durable and self._has_created:
                self.target.directory.sync()
            self._has_created = False
        except OSError as e:
            e.filename = self.target.given
            raise

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | NOFOLLOW
        self.fd = self.target.directory.open(self.target.name, flags, 0o666)

    def _end(self, *, failed: bool) -> None:
        # As Replacement.abandon: each step also if a signal's exception ends the one before.
        try:
            if self.fd >= 0:
                fd, self.fd = self.fd, -1
                try:  # noqa: SIM105
                    os.close(fd)
                except OSError:
                    pass
        finally:
            try:
                if failed and self._has_created and os.getpid() == self._process:
                    self._has_created = False
                    with contextlib.suppress(OSError):
                        self.target.directory.remove_file(self.target.name)
            finally:
                if _being_written.get(self.target.identity) is self:
                    del _being_written[self.target.identity]


def _refuse_mapped(target: FileTarget) -> None:
    """Pages of an emptied file are gone: whoever reads them, such as the save itself, is killed by SIGBUS."""
    if target.existing is not None and _is_mapped(target.existing):
        raise StateDictIOError(
            f"{target.given}: this process has the file mapped into memory (torch.load(mmap=True)?), and writing it in "
            "place would take the tensors' data away; clone the tensors and drop the mapped ones, or save to another "
            "path"
        )


def _is_mapped(facts: os.stat_result) -> bool:
    """Whether this process maps the file; False where the system does not tell."""
    try:
        with open("/proc/self/maps", errors="surrogateescape") as maps:  # address, access, offset, device, inode, path
            found = re.findall(rf"^\S+ \S+ \S+ (\w+):(\w+) {facts.st_ino} +(.*)$", maps.read(), re.MULTILINE)
    except OSError:
        return False
    for major, minor, path in found:
        if (int(major, 16), int(minor, 16)) == (os.major(facts.st_dev), os.minor(facts.st_dev)):
            return True
        # Some file systems (btrfs, overlays) have another device number here than stat() tells.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), facts):
                return True
    return False


in_forked_child(_being_written.clear)
