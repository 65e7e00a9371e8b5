"""Opening an archive for reading, and its records by name."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .. import backends
from ..archive.record_entry import RecordEntry
from ..backends.protocol import Backend, OpenArchive
from ..errors import CorruptCheckpointError, FileKindError, StateDictIOError, UnknownKindError, corrupt, naming
from ..formats import kinds
from ..formats.kinds import ZIP_START
from ..pickles.lean_pickle import LeanPickle
from ..remote.urls import is_url
from ..system.descriptors import descriptor_of, read_at
from ..untrusted.escaping import escaped
from ..untrusted.limits import MAX_RECORDS_SHOWN, SPARE_NBYTES, listed, shown

if TYPE_CHECKING:
    from ..remote.ranges import RangedObject

DATA_PKL = "data.pkl"
_ZIP_END = b"PK\x05\x06"
_ZIP_END_NBYTES = 22  # without a comment, of which torch writes none
# A round trip takes milliseconds, in which so much could have come.
_CHEAP_NBYTES_OF_NETWORK = 256 << 10
_END_NBYTES = 128 << 10  # the directory of some thousand records; their data.pkl


class StoredRecords:
    """The records of an archive by name.

    Owns nothing: the archive's descriptor must stay open. Used by one thread at a time.
    """

    def __init__(
        self,
        archive: OpenArchive,
        path: str,
        lean_pickle: Callable[[bytes], LeanPickle] = LeanPickle.unchanged,
        *,
        file_nbytes: int = 0,
        mtime_ns: int | None = None,
        descriptor: int | None = None,
        cheap_nbytes: int = 4 << 10,
    ) -> None:
        self.archive = archive
        self.path = path
        self.file_nbytes = file_nbytes
        self.mtime_ns = mtime_ns  #: of the file when it was opened, ns since the epoch; None where there is no file
        self.descriptor = descriptor  #: of the file, for reading; None where there is none
        self.cheap_nbytes = cheap_nbytes  #: a read of so many costs what a read of one byte does
        self.lean_pickle = lean_pickle
        self.entries = archive.records

    @functools.cached_property
    def _indices(self) -> dict[str, int]:
        return {entry.name: index for index, entry in enumerate(self.entries)}

    def __contains__(self, name: object) -> bool:
        return name in self._indices

    def names(self) -> list[str]:
        return list(self._indices)

    def index(self, name: str) -> int:
        found = self._indices.get(name)
        if found is None:
            raise corrupt(self.path, f"it has no record {shown(name)!r}, which its data.pkl asks for")
        return found

    def entry(self, name: str) -> RecordEntry:
        return self.entries[self.index(name)]

    def sized(self, name: str, nbytes: int) -> int:
        """The index of the record ``name``, which data.pkl says has ``nbytes``."""
        index = self.index(name)
        found = self.entries[index].nbytes
        if found != nbytes:
            raise corrupt(self.path, f"record {shown(name)!r} has {found} bytes, data.pkl says {nbytes}")
        return index

    def read(self, name: str) -> bytes:
        if name == DATA_PKL and name not in self:
            raise corrupt(self.path, "it has no record 'data.pkl': torch.save did not write this archive")
        return self.archive.read(self.index(name))

    def payload_offset(self, name: str) -> int:
        return self.archive.payload_offset(self.index(name))

    def header_offset(self, name: str) -> int:
        return self.entry(name).header_offset

    @functools.cached_property
    def _storages_and_others(self) -> tuple[list[int], list[int]]:
        kinds: tuple[list[int], list[int]] = ([], [])
        for index, entry in enumerate(self.entries):
            kinds[0 if _is_storage(entry.name) else 1].append(index)
        return kinds

    def storages(self) -> list[int]:
        """The records ``data/...``, in the order in which the unpickler will ask for them: that of the keys in all
        files of torch, whatever order another writer gave them."""
        found = self._storages_and_others[0]
        expected = (f"data/{key}" for key in range(len(found)))
        if any(self.entries[index].name != name for index, name in zip(found, expected, strict=True)):
            return sorted(found, key=lambda index: _key_order(self.entries[index].name))
        return found

    def others(self) -> list[int]:
        """All records but :meth:`storages`."""
        return self._storages_and_others[1]

    @functools.cached_property
    def _kinds_with_crc(self) -> frozenset[bool]:
        return frozenset(_is_storage(entry.name) for entry in self.entries if entry.crc32)

    def has_crc(self, index: int) -> bool:
        """Whether the CRC of a record was recorded.

        A recorded 0 is a CRC like others, one of 2^32, or means that there is none: torch writes 0 for all records with
        CRCs off, and for all storages with ``skip_data()``. So a 0 counts where another record of its kind (storages,
        the others) has a CRC that is not 0.
        """
        return _is_storage(self.entries[index].name) in self._kinds_with_crc

    def explained(self, error: CorruptCheckpointError) -> CorruptCheckpointError:
        """``error`` with the names of the tensors that live in its records."""
        if not error.records:
            return error
        described = "; ".join(self.describe(error.records[:MAX_RECORDS_SHOWN]))
        if len(error.records) > MAX_RECORDS_SHOWN:
            described += f"; and {len(error.records) - MAX_RECORDS_SHOWN} more records"
        return corrupt(self.path, f"checksums do not match: {described}", error.records)

    def describe(self, names: tuple[str, ...] | list[str]) -> list[str]:
        """A line a record: its name and its tensors."""
        from ..names.tensors_of_records import tensors_by_record

        tensors: dict[str, list[str]] = {}
        try:
            # A compressed one may be a thousand times as large as what the file has of it.
            if DATA_PKL in self and self.entry(DATA_PKL).nbytes <= self.file_nbytes + SPARE_NBYTES:
                tensors = tensors_by_record(self.read(DATA_PKL), self.file_nbytes)
        except (StateDictIOError, OSError):
            tensors = {}
        lines = []
        for name in names:
            living = tensors.get(name, [])
            named = f" (tensors: {listed(living, lambda tensor: escaped(shown(tensor)))})" if living else ""
            lines.append(f"record {escaped(shown(name))}{named}")
        return lines


def _is_storage(name: str) -> bool:
    return name[:5] == "data/" and name[-1] != "/"


def _key_order(name: str) -> tuple[int, int | str]:
    key = name[len("data/") :]
    return (0, int(key)) if key.isdecimal() and len(key) < 20 else (1, key)


@contextmanager
def open_records(
    path: Any, backend: str = "auto", *, random_access: bool = False, name: str | None = None
) -> Iterator[StoredRecords]:
    """The records of the file at ``path``, or at a URL, which is open inside the block.

    ``random_access`` tells the kernel not to read ahead. ``name`` is what errors call the file, where not by its path.

    Raises:
        OSError: the file cannot be opened or read.
        CorruptCheckpointError: it is not a sound archive.
        FileKindError: it is of another kind; an :class:`UnknownKindError` is a CorruptCheckpointError too.
    """
    chosen = backends.for_reading(backend)
    backends.warn_if_reading_is_slow(backend)
    if not is_url(path):
        given = os.fsdecode(path)
        with _opened_file(given, name or given, chosen, random_access) as records:
            yield records
        return
    from ..remote import ranges

    with ranges.open_url(path) as found:
        if isinstance(found.content, str):
            with _opened_file(found.content, found.url, chosen, random_access) as records:
                yield records
        else:
            yield of_ranges(found.content, chosen)


def of_ranges(source: RangedObject, chosen: Backend) -> StoredRecords:
    """The records of an object that is not on this machine; it must stay open."""

    def read_at(offset: int, nbytes: int) -> bytes:
        data = bytearray(max(min(nbytes, source.nbytes - offset), 0))
        source.read_into(memoryview(data), offset)
        return bytes(data)

    from ..backends.python_reading import NETWORK, PythonOpenArchive

    reader = _open_archive(lambda: PythonOpenArchive(source, source.name, NETWORK), read_at, source.nbytes, source.name)
    return StoredRecords(
        reader, source.name, chosen.lean_pickle, file_nbytes=source.nbytes, cheap_nbytes=_CHEAP_NBYTES_OF_NETWORK
    )


def archive_at(fd: int, path: str, backend: Backend) -> OpenArchive:
    """The archive in an open file.

    Raises:
        OSError, CorruptCheckpointError, FileKindError: as :func:`open_records`.
    """
    return _open_archive(
        lambda: backend.open_archive(fd, path),
        lambda offset, nbytes: read_at(fd, nbytes, offset),
        os.fstat(fd).st_size,
        path,
    )


def _open_archive(
    open_archive: Callable[[], OpenArchive], read_at: Callable[[int, int], bytes], file_nbytes: int, path: str
) -> OpenArchive:
    """``open_archive()``, where the file is an archive.

    Args:
        read_at: ``read_at(offset, nbytes)`` gives bytes of the file, fewer at its end.
    """
    start = read_at(0, kinds.START_NBYTES)
    kind = kinds.of_start(start, path)
    if kind is kinds.UNKNOWN and read_at(max(file_nbytes - _ZIP_END_NBYTES, 0), len(_ZIP_END)) != _ZIP_END:
        raise UnknownKindError(f"{path}: {kinds.described(kind, start)}")
    if kind is not None and kind is not kinds.UNKNOWN:
        raise FileKindError(f"{path}: {kind}")
    if not start.startswith(ZIP_START):
        if kind is None:
            raise corrupt(path, kinds.damaged_start(start))
        raise corrupt(path, "does not begin like a file of torch.save (a zip archive)")
    try:
        return open_archive()
    except CorruptCheckpointError:
        kind = kinds.of_refused_zip(start)
        if kind is None:
            raise
    raise FileKindError(f"{path}: {kind}")


def check_kind(records: StoredRecords, *, allowed: Collection[kinds.FileKind] = ()) -> None:
    """Refuses archives that torch.save did not write.

    Raises:
        FileKindError: names the kind.
    """
    if DATA_PKL in records and kinds.CONSTANTS not in records:
        return  # of torch.save: what the other names are, which may be a million, does not matter
    kind = kinds.of_records(entry.name for entry in records.entries)
    if kind is not None and kind not in allowed:
        raise FileKindError(f"{records.path}: {kind}")


@contextmanager
def _opened_file(path: str, given: str, chosen: Backend, random_access: bool) -> Iterator[StoredRecords]:
    """``given``: what errors call it."""
    with naming(given), descriptor_of(path, os.O_RDONLY) as fd:
        if random_access and hasattr(os, "posix_fadvise"):
            # The directory is at the end and data.pkl at the beginning: the disk fetches both at once.
            for begin in (max(0, os.fstat(fd).st_size - _END_NBYTES), 0):
                _advise(fd, begin, _END_NBYTES, os.POSIX_FADV_WILLNEED)
            _advise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        found = os.fstat(fd)
        yield StoredRecords(
            archive_at(fd, given, chosen),
            given,
            chosen.lean_pickle,
            file_nbytes=found.st_size,
            mtime_ns=found.st_mtime_ns,
            descriptor=fd,
        )


def _advise(fd: int, offset: int, nbytes: int, advice: int) -> None:
    with suppress(OSError):  # a file system that takes none reads as well
        os.posix_fadvise(fd, offset, nbytes, advice)
