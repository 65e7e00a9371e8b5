"""What ``load`` does at the steps of ``torch.load``: which archives are read here, and what is verified when."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
import torch.serialization

from .. import backends
from ..backends.protocol import Backend
from ..errors import corrupt
from ..formats import kinds
from ..installed import stock, torch_format
from ..pickles.persistent_ids import StorageFeed
from ..pickles.unpickling import LoadSteps, ZipReader, swaps_bytes
from ..progress import ProgressCallback
from .map_location import is_meta, only_device, stays_on_cpu
from .object_source import ObjectSource
from .opened_again import opened_again
from .opened_bytes import FileBytes, ObjectBytes, OpenedBytes, PartOfBytes
from .readahead import ReadAhead
from .records import StoredRecords, archive_in, check_kind, records_in

if TYPE_CHECKING:
    from ..remote.ranges import RangedObject


@dataclass(slots=True)
class LoadRequest:
    """The arguments of one call of ``load``, and what was found for them."""

    f: Any  #: as torch takes it
    source: RangedObject | PartOfBytes | None  #: where it came as a URL, or as a part of a file
    name: Any  #: for messages
    map_location: Any
    mmap: bool | None
    verify: bool
    wish: str  #: for a backend
    backend: Backend
    progress: ProgressCallback | None

    @property
    def is_path(self) -> bool:
        return isinstance(self.f, (str, os.PathLike))

    @property
    def is_mapped(self) -> bool:
        return self.is_path and wants_map(self.mmap)


def wants_map(mmap: bool | None) -> bool:
    """``mmap`` as torch takes it."""
    return bool(stock.setting("load", "mmap", False) if mmap is None else mmap)


class ArchiveSteps(LoadSteps):
    """The steps of one load. Which reader it is that :meth:`open_archive` opens decides which steps follow.

    Args:
        file: the file at the path, where it has been opened. It is read once, and left open.
    """

    def __init__(self, request: LoadRequest, file: BinaryIO | None) -> None:
        self.request = request
        self._file = file
        self.stopped_at_end = False  #: whether the unpickler has failed at the end of a file that is no archive
        self.name = os.fsdecode(request.name) if isinstance(request.name, (str, os.PathLike)) else "the file"
        # Of an archive that is read here:
        self._records: StoredRecords | None = None
        self._feed: ReadAhead | None = None  #: None where no data is read
        # Of one that torch reads by itself:
        self._unchecked: StoredRecords | None = None  #: to be verified before that
        self._settle: Callable[[], None] = lambda: None  #: of :func:`opened_again`

    def open_file(self, f: Any, mode: str) -> contextlib.AbstractContextManager[Any]:
        file, self._file = self._file, None
        return super().open_file(f, mode) if file is None else contextlib.nullcontext(file)

    def open_archive(self, file: Any) -> contextlib.AbstractContextManager[Any]:
        records = self._open_records(file)
        if records is None or self._is_for_torch(records):
            return self._open_for_torch(file, records)
        return contextlib.nullcontext(self._open_here(records))

    def _open_here(self, records: StoredRecords) -> ZipReader:
        request = self.request
        check_kind(records)
        _check_made_by_torch(records)
        self._records = records
        if request.verify:
            _check(records, records.others())
        if is_meta(request.map_location):
            return self._reader(records, _MetaFeed(), meta=True)
        device = only_device(request.map_location, lambda: swaps_bytes(records))
        backends.warn_if_reading_is_slow(request.wish, device=device)
        self._feed = ReadAhead(
            records,
            stay=stays_on_cpu(request.map_location, records),
            device=device,
            verify=request.verify,
            progress=request.progress,
        )
        return self._reader(records, self._feed)

    def _reader(self, records: StoredRecords, feed: StorageFeed, meta: bool = False) -> ZipReader:
        # Without data there is nothing to swap.
        return ZipReader(records, feed, lean_pickle=self.request.backend.lean_pickle, assume_own_byteorder=meta)

    def after_archive(self) -> None:
        """What was not read has to be sound too."""
        if self.request.verify and self._records is not None:
            unread = self._records.storages() if self._feed is None else self._feed.unread()
            _check(self._records, unread)

    def _open_for_torch(self, file: Any, records: StoredRecords | None) -> contextlib.AbstractContextManager[Any]:
        self._unchecked = records if self.request.verify else None
        if records is not None and self.request.is_mapped and not _is_torchscript(records):
            return self._open_to_map(file)
        self._check_all()
        return torch.serialization._open_zipfile_reader(file)

    @contextlib.contextmanager
    def _open_to_map(self, file: Any) -> Iterator[Any]:
        with (
            torch.serialization._open_zipfile_reader(file) as reader,
            opened_again(file, self.request.f) as self._settle,
        ):
            yield reader

    def before_stock(self) -> None:
        """Raises :class:`Replaced` where what torch has mapped may be another file."""
        self._settle()
        self._check_all()

    def before_legacy(self, file: Any) -> None:
        """Raises :class:`ValueError` where the file is to be verified, and has nothing to do that by."""
        if not self.request.verify:
            return
        start = file.tell()
        legacy = kinds.is_legacy(file.read(kinds.START_NBYTES))
        file.seek(start)
        if legacy:
            raise ValueError(without_checksums(self.request.name, "in torch's legacy format", " and save it again"))

    def after_failed_legacy(self, file: Any) -> None:
        if self.request.is_path or self.request.source is not None:
            self.stopped_at_end = not file.read(1)

    @contextlib.contextmanager
    def verified(self) -> Iterator[Any]:
        """What to load instead of ``f``, for a torch whose code cannot be used in part: verified where that is wanted.

        Raises:
            Replaced: as :meth:`before_stock`, at the end.
        """
        if not self.request.verify:
            yield self.request.f
            return
        with torch.serialization._open_file_like(self.request.f, "rb") as file:
            start = file.tell()
            self.before_legacy(file)
            self._unchecked = self._open_records(file)
            self._check_all()
            file.seek(start)
            if not self.request.is_path:
                yield self.request.f
            elif not self.request.is_mapped:
                yield file
            else:
                with opened_again(file, self.request.f):
                    yield self.request.f

    def _check_all(self) -> None:
        """Checks the archive that torch reads, if that has not been done and is wanted."""
        records, self._unchecked = self._unchecked, None
        if records is not None:
            _check(records, range(len(records.entries)), self.request.progress)

    def _open_records(self, file: Any) -> StoredRecords | None:
        """None where nobody needs them."""
        if self.request.source is not None:
            return records_in(self._opened_source())
        if self.request.is_path:
            opened = FileBytes(file.fileno(), os.fsdecode(self.request.name), self.request.backend)
            return StoredRecords(archive_in(opened), opened.name, file_nbytes=opened.nbytes)
        if not self.request.verify:
            return None
        from ..backends.python_reading import PythonOpenArchive

        source = ObjectSource(file)
        try:
            return StoredRecords(PythonOpenArchive(source, source.name), source.name, file_nbytes=source.nbytes)
        finally:
            file.seek(source.start)

    def _opened_source(self) -> OpenedBytes:
        source = self.request.source
        assert source is not None
        return source if isinstance(source, PartOfBytes) else ObjectBytes(source, self.request.backend)

    def _is_for_torch(self, records: StoredRecords) -> bool:
        return (
            not (self.request.is_path or self.request.source is not None)
            or self.request.is_mapped
            or _is_torchscript(records)
            or makes_no_data()
        )


def makes_no_data() -> bool:
    """Whether what torch loads now has no data: under a mode for fake tensors, or a setting."""
    return torch._guards.detect_fake_mode(None) is not None or bool(torch_format.skip_data())


def _check(records: StoredRecords, indices: Iterable[int], progress: ProgressCallback | None = None) -> None:
    from .verification import check

    check(records, indices, progress)


def _is_torchscript(records: StoredRecords) -> bool:
    return "constants.pkl" in records


class _MetaFeed:
    """For a torch that reads before it finds out that nobody wants the data."""

    def take(self, name: str, nbytes: int) -> torch.UntypedStorage:
        del name
        return torch.UntypedStorage(nbytes, device="meta")


def without_checksums(name: Any, kind: str, cure: str = "") -> str:
    """What ``verify=True`` is told of such a file."""
    return f"verify=True: {name} is {kind}, which has no checksums; load it with verify=False{cure}"


def _check_made_by_torch(records: StoredRecords) -> None:
    """What ``torch._C.PyTorchFileReader`` asks of every archive."""
    if not records.archive.archive_name:
        raise corrupt(records.path, "its records are not in a folder, torch.save did not write this archive")
    if "version" not in records and ".data/version" not in records:
        raise corrupt(records.path, "it has no record 'version', torch.save did not write this archive")
