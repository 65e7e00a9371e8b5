"""One open archive of ``torch.save``: its structure, and any part of any tensor in it."""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ...errors import corrupt
from ...formats.kinds import ZIP_START
from ...pickles.hash_bounds import Gate
from ...pickles.persistent_ids import StorageFeed
from ...pickles.refusals import without_frames
from ...pickles.set_aside import Refused
from ...pickles.unpickling import ReadBy, ZipReader, can_rebind, load_through, swaps_bytes
from ..opened_bytes import OpenedBytes
from ..records import DATA_PKL, StoredRecords, check_kind, records_in
from .placeholders import PlaceholderFeed
from .stored_tensors import Filling, StoredTensors

_SERIALIZATION_ID = ".data/serialization_id"
_MAX_ID_NBYTES = 4096


class FileVersion(NamedTuple):
    """Tells one content of a file from another; equal for copies of a file that says what its content is."""

    nbytes: int
    serialization_id: bytes | None  #: hashes names and checksums; None where the file has none, or no checksums
    mtime_ns: int | None  #: ns since the epoch; None where the serialization id, or the store, says more
    store_version: str | None = None  #: of an object in a store that tells one version from another


class LazyFile:
    """A file that is opened once: directory, pickle and payloads are those of one version of it, whatever takes its
    place meanwhile.

    Tensors of the unpickled structure are the placeholders.

    Args:
        opened: the file.
        max_overhead, keeps_inflated: as of :class:`~.stored_tensors.StoredTensors`.

    Raises:
        OSError, CorruptCheckpointError, FileKindError: as :func:`~statedict_io.reading.records.open_records`.
    """

    def __init__(self, opened: OpenedBytes, *, max_overhead: float = 2, keeps_inflated: bool = False) -> None:
        self._records = records_in(opened)
        self._store_version = opened.store_version
        check_kind(self._records)
        self._placeholders = PlaceholderFeed(self._records)
        self._gate = Gate()
        self.swaps = swaps_bytes(self._records)  #: whether the file has the other byte order than this machine
        self.stored = StoredTensors(
            self._records,
            swaps=self.swaps,
            max_overhead=max_overhead,
            keeps_inflated=keeps_inflated,
        )

    @property
    def records(self) -> StoredRecords:
        """For what needs no tensors.

        Raises:
            ValueError: the file is closed.
        """
        assert self.stored.payloads is self._records
        return self._records

    @property
    def path(self) -> str:
        """As given."""
        return self._records.path

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self._records.file_nbytes

    @property
    def bytes_read(self) -> int:
        """Of the file: directory, ``data.pkl``, headers and payloads."""
        return self._structure_nbytes() + self.stored.bytes_read

    def close(self) -> None:
        """Nothing more is read; what was read stays valid."""
        self.stored.close()

    @functools.cached_property
    def version(self) -> FileVersion:
        """Which content of the file is open.

        Raises:
            CorruptCheckpointError, OSError: the record with the serialization id cannot be read.
        """
        records = self._records
        if self._store_version is not None:
            return FileVersion(self.nbytes, None, None, self._store_version)
        storages = records.storages()
        has_checksums = all(records.has_crc(index) for index in storages if records.entries[index].nbytes)
        if has_checksums and _SERIALIZATION_ID in records and records.entry(_SERIALIZATION_ID).nbytes <= _MAX_ID_NBYTES:
            return FileVersion(self.nbytes, records.read(_SERIALIZATION_ID), None)
        return FileVersion(self.nbytes, None, records.mtime_ns)

    def unpickle(
        self,
        *,
        weights_only: bool = True,
        sets_aside: bool = False,
        defers: bool = False,
        feed: StorageFeed | None = None,
    ) -> Any:
        """What was saved, with placeholders for tensors. Those of earlier calls are placeholders no more.

        Args:
            weights_only: with torch's restricted unpickler.
            sets_aside: what that refuses becomes a :class:`~statedict_io.pickles.set_aside.Refused`.
            defers: plain tensors become :class:`~statedict_io.pickles.unpickling.DeferredTensor`.
            feed: of storages that are no placeholders.

        Raises:
            Exception: what ``torch.load`` raises for what it will not unpickle.
        """
        if feed is None:
            feed = self._placeholders = PlaceholderFeed(self._records)
        reader = ZipReader(
            self.records,
            feed,
            lean_pickle=self._records.lean_pickle,
            assume_own_byteorder=True,
            in_place=True,
            placeholders=True,
            defers=defers,
            sets_aside=sets_aside,
            gate=self._gate,
        )
        if not can_rebind():
            raise corrupt(self.path, f"torch {torch.__version__} cannot be made to read it lazily")
        with io.BytesIO(ZIP_START) as file:  # all that torch looks at before it asks the reader
            load = load_through(ReadBy(reader))
            return load(file, "cpu", weights_only=weights_only, mmap=False)

    @staticmethod
    def unpickle_most(unpickle: Callable[..., Any]) -> Any:
        """What ``unpickle()`` gives, or ``unpickle(sets_aside=True)`` where something is refused.

        Raises:
            pickle.UnpicklingError: all of it is refused, or what is allowed cannot do without what is not.
        """
        refusal: BaseException
        try:
            return unpickle()
        except pickle.UnpicklingError as e:
            refusal = without_frames(e)
        found: Any = Refused(())
        try:
            found = unpickle(sets_aside=True)
        except (OSError, MemoryError):
            raise
        except Exception:  # whatever an object that can do nothing leads to
            pass
        if isinstance(found, Refused):
            raise refusal
        return found

    def is_plain(self, value: Any) -> bool:
        """Whether ``value`` is a tensor whose bytes lie in a record, element by element."""
        return isinstance(value, torch.Tensor) and self._placeholders.record_of(value) is not None

    def record_of(self, tensor: torch.Tensor) -> int | None:
        """The one record that a plain tensor lies in; None for other kinds.

        Raises:
            CorruptCheckpointError: the tensor reaches beyond it.
        """
        record = self._placeholders.record_of(tensor)
        if record is not None:
            self.stored.check(record, tensor)
        return record

    def tensor(self, placeholder: torch.Tensor) -> torch.Tensor:
        """A plain tensor with its data; see :meth:`StoredTensors.tensor`."""
        return self.stored.tensor(self._plain_record_of(placeholder), placeholder)

    def read(self, view: torch.Tensor, target: torch.Tensor) -> None:
        """Fills ``target`` from a view of the placeholder of a plain tensor; see :meth:`StoredTensors.read`."""
        self.stored.read(self._plain_record_of(view), view, target)

    @property
    def gathered_nbytes(self) -> int:
        """See :attr:`StoredTensors.gathered_nbytes`."""
        return self.stored.gathered_nbytes

    def read_all(self, views_and_targets: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """As :meth:`read`, for each; side by side where the file is far away."""
        self.stored.read_all([Filling(self._plain_record_of(view), view, target) for view, target in views_and_targets])

    def _plain_record_of(self, tensor: torch.Tensor) -> int:
        record = self._placeholders.record_of(tensor)
        assert record is not None, "not plain"
        return record

    def _structure_nbytes(self) -> int:
        """Of the directory and ``data.pkl``."""
        entries = self._records.entries
        end = max((entry.header_offset + entry.stored_nbytes for entry in entries), default=0)
        return self.nbytes - end + (self._records.entry(DATA_PKL).stored_nbytes if DATA_PKL in self._records else 0)
