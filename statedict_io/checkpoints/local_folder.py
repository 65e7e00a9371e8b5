"""A directory of this machine's file systems."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Literal

from ..system.descriptors import open_file, sync
from ..system.directories import OpenDirectory
from ..writing import leftovers
from ..writing.places import OpenFile, write_file
from ..writing.targets import FileTarget, resolve
from .folder import PIECE_NBYTES, Listed


class LocalFolder:
    """Nothing is opened or made before something is asked for; used from any thread."""

    is_local = True

    def __init__(self, path: str) -> None:
        if not path:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        with contextlib.suppress(OSError):  # the working directory may be gone, or not ours to look up
            path = os.path.join(os.getcwd(), path)
        self.path = path
        self.identity = os.path.realpath(path)

    def listed(self) -> list[Listed]:
        try:
            with os.scandir(self.path) as entries:
                return [Listed(entry.name, _kind(entry), f"{entry.inode():x}") for entry in entries]
        except FileNotFoundError:
            return []

    def path_of(self, name: str) -> str:
        return os.path.join(self.path, name)

    shown = path_of

    def version(self, name: str) -> str | None:
        found = self._stat(name)
        return None if found is None else f"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"

    def nbytes_and_time(self, name: str) -> tuple[int, float | None] | None:
        found = self._stat(name)
        return None if found is None else (found.st_size, found.st_mtime)

    def _stat(self, name: str) -> os.stat_result | None:
        try:
            return os.stat(self.path_of(name))
        except FileNotFoundError:
            return None

    def read(self, name: str, max_nbytes: int) -> bytes | None:
        path = self.path_of(name)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would wait for ever
                return None
            with open(path, "rb") as file:
                data = file.read(max_nbytes + 1)
        except FileNotFoundError:
            return None
        return data if len(data) <= max_nbytes else None

    def pieces(self, name: str) -> Iterator[bytes]:
        with open(self.path_of(name), "rb", buffering=0) as file:
            while piece := file.read(PIECE_NBYTES):
                yield piece

    def write(self, name: str, data: bytes) -> None:
        def write(file: OpenFile) -> None:
            left = memoryview(data)
            while left:
                left = left[os.write(file.fd, left) :]

        target = resolve(self.path_of(name))
        try:
            if not isinstance(target, FileTarget):
                raise OSError(errno.ESPIPE, "is not a regular file", target.given)
            write_file(target, write, durable=False, atomic=None)
        finally:
            target.close()

    def sync(self, name: str, *, also_name: bool) -> None:
        fd = open_file(self.path_of(name), os.O_WRONLY)
        try:
            sync(fd)
        finally:
            os.close(fd)
        if also_name:
            _sync_directory(self.path)

    def create(self, *, durable: bool) -> None:
        _make_directory(self.path.rstrip(os.sep) or os.sep, durable=durable)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path_of(name))

    def remove_leftovers(self, names: list[str], *, fresh: str | None) -> None:
        if not names:
            return
        with contextlib.suppress(OSError):
            directory = OpenDirectory(self.path)
            try:
                for name in names:
                    if fresh is None:
                        leftovers.remove_unlocked(directory, name)
                    else:
                        leftovers.remove_if_left_over(directory, name, fresh)
            finally:
                directory.close()


def _make_directory(path: str, *, durable: bool) -> None:
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return
    except FileNotFoundError:
        parent = os.path.dirname(path)
        if parent == path:
            raise
    _make_directory(parent, durable=durable)
    with contextlib.suppress(FileExistsError):  # another process has just made it
        os.mkdir(path)
    if durable:
        _sync_directory(parent)


def _sync_directory(path: str) -> None:
    directory = OpenDirectory(path)
    try:
        directory.sync()
    finally:
        directory.close()


def _kind(entry: os.DirEntry[str]) -> Literal["file", "link", "other"]:
    try:
        if entry.is_symlink():
            return "link"
        return "file" if entry.is_file(follow_symlinks=False) else "other"
    except OSError:  # a file system that tells only by stat(), and would not
        return "file"
