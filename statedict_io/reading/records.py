"""Opening an archive for reading, and its records by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from ..backends.protocol import OpenArchive
from ..errors import CorruptCheckpointError, FileKindError, StateDictIOError, UnknownKindError, corrupt
from ..formats import kinds
from ..formats.kinds import ZIP_START
from ..pickles.lean_pickle import LeanPickle
from ..untrusted.escaping import escaped
from ..untrusted.limits import MAX_RECORDS_SHOWN, SPARE_NBYTES, listed, shown
from .opened_bytes import OpenedBytes, open_bytes
from .payloads import StoredPayloads

DATA_PKL = "data.pkl"
_ZIP_END = b"PK\x05\x06"
_ZIP_END_NBYTES = 22  # without a comment, of which torch writes none


class StoredRecords(StoredPayloads):
    """The records of an archive by name."""

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
        super().__init__(
            archive,
            path,
            file_nbytes=file_nbytes,
            mtime_ns=mtime_ns,
            descriptor=descriptor,
            cheap_nbytes=cheap_nbytes,
        )
        self.lean_pickle = lean_pickle

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
    """The records of the archive at ``path``, or at a URL, which is open inside the block; arguments as of
    :func:`~statedict_io.reading.opened_bytes.open_bytes`.

    Raises:
        OSError: the file cannot be opened or read.
        CorruptCheckpointError: it is not a sound archive.
        FileKindError: it is of another kind; an :class:`UnknownKindError` is a CorruptCheckpointError too.
    """
    with open_bytes(path, backend, random_access=random_access, name=name) as opened:
        yield records_in(opened)


def records_in(opened: OpenedBytes) -> StoredRecords:
    """The records of an open archive.

    Raises:
        OSError, CorruptCheckpointError, FileKindError: as :func:`open_records`.
    """
    return StoredRecords(
        archive_in(opened),
        opened.name,
        opened.backend.lean_pickle,
        file_nbytes=opened.nbytes,
        mtime_ns=opened.mtime_ns,
        descriptor=opened.descriptor,
        cheap_nbytes=opened.cheap_nbytes,
    )


def archive_in(opened: OpenedBytes) -> OpenArchive:
    """
    Raises:
        OSError, CorruptCheckpointError, FileKindError: as :func:`open_records`.
    """
    kind = kind_of(opened)
    if kind is not None:
        raise FileKindError(f"{opened.name}: {kind}")
    start = opened.read_at(0, kinds.START_NBYTES)
    if not start.startswith(ZIP_START):
        if kinds.of_start(start, opened.name) is None:
            raise corrupt(opened.name, kinds.damaged_start(start))
        raise corrupt(opened.name, "does not begin like a file of torch.save (a zip archive)")
    try:
        return opened.open_archive()
    except CorruptCheckpointError:
        kind = kinds.of_refused_zip(start)
        if kind is None:
            raise
    raise FileKindError(f"{opened.name}: {kind}")


def kind_of(opened: OpenedBytes) -> kinds.FileKind | None:
    """What a file is by its beginning; None for a zip archive, sound or damaged.

    Raises:
        UnknownKindError: no kind is recognized.
    """
    start = opened.read_at(0, kinds.START_NBYTES)
    kind = kinds.of_start(start, opened.name)
    if kind is not kinds.UNKNOWN:
        return kind
    if opened.read_at(max(opened.nbytes - _ZIP_END_NBYTES, 0), len(_ZIP_END)) != _ZIP_END:
        raise UnknownKindError(f"{opened.name}: {kinds.described(kind, start)}")
    return None


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
