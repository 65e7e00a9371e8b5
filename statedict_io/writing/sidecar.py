"""``NAME.sha256``, the file beside a saved one that holds its SHA-256 as ``sha256sum -c`` wants it.

It is never there for another file than the one beside it: the old one is removed before the file is replaced, and the
new one comes after. A saver that dies in between leaves a good file without a sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..system.descriptors import write_all
from .places import write_file
from .targets import FileTarget, URLTarget

if TYPE_CHECKING:
    from ..remote.stores import Place

SUFFIX = ".sha256"


def lines(sums: Iterable[tuple[str, str]]) -> bytes:
    """
    Args:
        sums: names of files in the directory of the sidecar, each with its sum in hex.
    """
    return "".join(_line(name, hexdigest) for name, hexdigest in sums).encode(errors="surrogateescape")


def _line(name: str, hexdigest: str) -> str:
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{hexdigest}  {escaped}\n"


class Sidecar:
    """Of a file that is saved.

    Args:
        durable: flush it, and its name, to the device.
        atomic: as of :func:`~statedict_io.writing.places.write_file`.
    """

    def __init__(self, target: FileTarget, *, durable: bool, atomic: bool | None) -> None:
        self._target = target
        self._durable = durable
        self._atomic = atomic

    @property
    def name(self) -> str:
        return self._target.name + SUFFIX

    def remove(self) -> None:
        """Before the file that it is of goes; again: does nothing.

        Raises:
            OSError: says what it is about.
        """
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

    def write(self, hexdigest: str, is_superseded: Callable[[], bool]) -> None:
        self.write_sums([(self._target.name, hexdigest)], is_superseded)

    def write_sums(self, sums: Iterable[tuple[str, str]], is_superseded: Callable[[], bool]) -> None:
        """When the file is there, unless a later call has put another one there since.

        Raises:
            OSError: with the sidecar's path.
        """
        directory, target = self._target.directory, self._target
        beside = FileTarget(target.given + SUFFIX, directory, self.name, target.archive_name, None)
        try:
            beside.existing = directory.look_at(self.name)
        except OSError as e:
            e.filename = beside.given
            raise
        write_file(
            beside,
            lambda file: write_all(file.fd, memoryview(lines(sums))),
            durable=self._durable,
            atomic=self._atomic,
            is_superseded=is_superseded,
        )


class StoredSidecar:
    """The same of an object in a store."""

    def __init__(self, target: URLTarget) -> None:
        from ..remote.stores import Place

        place = target.place
        self._name = place.file_name
        self._place: Place = Place(place.url + SUFFIX, place.fs, place.path + SUFFIX)

    def remove(self) -> None:
        from ..remote.stores import naming_errors

        with naming_errors(self._place.url), contextlib.suppress(FileNotFoundError):
            self._place.fs.rm_file(self._place.path)

    def write(self, hexdigest: str, is_superseded: Callable[[], bool]) -> None:
        from ..remote.uploads import Upload

        content = lines([(self._name, hexdigest)])
        with Upload(self._place, len(content)) as upload:
            upload.write(memoryview(content))
            if not is_superseded():
                upload.commit()
