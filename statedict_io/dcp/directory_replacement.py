"""The checkpoint in a directory of DCP's is replaced as a whole: until the new ``.metadata`` is there, the old one
loads what it always did."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import uuid
from types import TracebackType

from torch.distributed.checkpoint.metadata import Metadata

from ..errors import StateDictIOError
from ..reading.dcp_metadata import DirectoryReader
from ..system import locks
from ..system.descriptors import open_file, sync
from ..writing.places import OpenFile, write_file
from ..writing.targets import FileTarget, resolve

_METADATA = ".metadata"
# Data files of ours, of a checkpoint or of a conversion that was killed.
_OURS = re.compile(r"__0_[0-9a-f]{32}_\d+\.distcp")
_OF_A_RANK = re.compile(r"__\d+\.metadata")


class DirectoryReplacement:
    """Data files go to names that begin with :attr:`prefix`, which no file has; :meth:`commit` writes the metadata that
    names them and removes those that nothing names any more. Without it they are removed, and the directory too where
    it was made here.

    Another process that converts into the directory waits, where the file system has locks.

    Args:
        directory: made where it is missing.
        atomic: False writes into ``.metadata`` itself, for a place that cannot replace it.
    """

    def __init__(self, directory: str, *, atomic: bool) -> None:
        self._directory = directory
        self._atomic = atomic
        self._descriptor = -1
        self._is_made = False
        self._is_locked = False
        self._is_over = False
        self.prefix = f"__0_{uuid.uuid4().hex}_"

    def __enter__(self) -> DirectoryReplacement:
        try:
            self._make()
            while not self._lock():
                self._make()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _make(self) -> None:
        self._is_made = not os.path.lexists(self._directory)
        os.makedirs(self._directory, exist_ok=True)

    def _lock(self) -> bool:
        """False where the directory was removed meanwhile, by a conversion that had made it and has failed."""
        # Some directories may not be read, some file systems have no locks, or none of directories, nor has Windows.
        with contextlib.suppress(OSError):
            self._descriptor = open_file(self._directory, os.O_RDONLY)
            self._is_locked = locks.hold(self._descriptor, waits=True) is True
        if not self._is_locked:
            return True
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._descriptor), os.stat(self._directory)):
                return True
        self._is_locked = False
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)
        return False

    def commit(self, metadata: Metadata) -> None:
        """
        Args:
            metadata: of what has been written, whose files are on the disk by now.

        Raises:
            OSError: the old checkpoint is as it was, unless ``atomic=False``.
        """
        target = resolve(os.path.join(self._directory, _METADATA), names_archive=False)
        if not isinstance(target, FileTarget):
            raise FileExistsError(f"{target.given}: is not a regular file")
        unneeded = self._named_by_the_old_metadata()
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # some file systems sync no directories
                sync(self._descriptor)

        def write(file: OpenFile) -> None:
            with open(file.fd, "wb", closefd=False) as stream:
                pickle.dump(metadata, stream)

        try:
            write_file(target, write, durable=True, atomic=self._atomic)
        finally:
            target.close()
        self._is_over = True
        if self._is_locked:
            unneeded.update(name for name in self._names() if _OURS.fullmatch(name))
        self._remove(unneeded - {info.relative_path for info in metadata.storage_data.values()})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if not self._is_over and not self._is_committed():
                self._remove({name for name in self._names() if name.startswith(self.prefix)})
                if self._is_made:
                    with contextlib.suppress(OSError):  # another has put something there
                        os.rmdir(self._directory)
        finally:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                os.close(descriptor)

    def _is_committed(self) -> bool:
        """Also where an error or a signal came up behind the exchange."""
        try:
            with open(os.path.join(self._directory, _METADATA), "rb") as file:
                return self.prefix.encode() in file.read()
        except OSError:
            return False

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._directory)
        except OSError:
            return []

    def _named_by_the_old_metadata(self) -> set[str]:
        """Nothing where it cannot be told what else needs them."""
        if any(_OF_A_RANK.fullmatch(name) for name in self._names()):
            return set()
        try:
            metadata = DirectoryReader(self._directory, weights_only=True).read_metadata()
        except (OSError, StateDictIOError, pickle.UnpicklingError):
            return set()
        return {info.relative_path for info in metadata.storage_data.values()}

    def _remove(self, names: set[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):  # it is in nobody's way
                os.unlink(os.path.join(self._directory, name))
