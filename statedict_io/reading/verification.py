"""``verify``: whether the bytes of a checkpoint are those that were saved. Unpickles nothing."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .. import progress as progress_module
from ..archive.record_entry import RecordEntry
from ..errors import CorruptCheckpointError, UnknownKindError
from ..formats import kinds
from ..progress import Progress, ProgressCallback
from ..untrusted.limits import MAX_RECORDS_AT_ONCE, MAX_RECORDS_SHOWN
from ..untrusted.on_demand import OnDemand
from .records import DATA_PKL, StoredRecords, check_kind, open_records

Status = Literal["ok", "corrupt", "crc-not-recorded"]
_STATUSES: tuple[Status, ...] = ("ok", "corrupt", "crc-not-recorded")


@dataclass(frozen=True)
class RecordReport:
    """One record of a checkpoint, such as ``data/0``."""

    name: str  #: without the archive's name
    nbytes: int  #: of the payload, uncompressed
    status: Status  #: "ok", "corrupt", or "crc-not-recorded" where the file was saved with CRCs off


class RecordReports(OnDemand[RecordReport]):
    """One for each record, in file order; made when they are asked for, because records can be as small as a name."""

    def __init__(self, entries: Sequence[RecordEntry], order: Sequence[int], statuses: bytearray) -> None:
        self._entries = entries
        self._order = order
        self._statuses = statuses  #: indices in ``_STATUSES``, in file order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[RecordReport]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        entry = self._entries[self._order[index]]
        return RecordReport(entry.name, entry.nbytes, _STATUSES[self._statuses[index]])


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found."""

    path: str  #: as given
    records: Sequence[RecordReport]  #: in file order; empty if the file is not an archive
    problems: list[str]  #: a line each, for people; names the tensors that live in a corrupt record
    is_known: bool = True  #: False if nothing tells what kind of file it is; it may be a damaged checkpoint

    @property
    def ok(self) -> bool:
        """No problem was found. A record without a recorded CRC is not a problem."""
        return not self.problems


def verify(path: Any, *, backend: str = "auto", progress: Progress = None) -> VerifyReport:
    """Reads the whole file and compares the CRC-32 of each record with the recorded one.

    Args:
        path: of a file in torch's zip format (a TorchScript archive is one too), or a URL of fsspec (``str``).
        backend: ``"auto"``, ``"native"`` or ``"python"``, as for :func:`load`.
        progress: ``True`` for a bar on stderr (needs ``tqdm``), or a callable taking (bytes_done, bytes_total).

    Returns:
        A report, also for a file whose structure is damaged.

    Raises:
        OSError: the file cannot be read.
        FileKindError: it is not an archive of ``torch.save`` but a file of another kind, such as torch's legacy format
            or safetensors, which record no checksums; names the kind.
        NativeUnavailableError: ``backend="native"`` and the extension cannot be used.
        TypeError: an option is of a wrong type; names it.

    Example:
        >>> sio.save({"w": torch.zeros(3)}, "weights.pt")
        >>> sio.verify("weights.pt").ok
        True
    """
    progress_module.check(progress)
    try:
        with progress_module.reporting(progress, "verify") as callback, open_records(path, backend) as records:
            check_kind(records, allowed=(kinds.TORCHSCRIPT, kinds.MOBILE))  # whose records are checked like others
            return _verify(records, callback)
    except CorruptCheckpointError as e:
        no_records = RecordReports((), array("Q"), bytearray())
        return VerifyReport(str(path), no_records, [str(e)], is_known=not isinstance(e, UnknownKindError))


def _verify(records: StoredRecords, progress: ProgressCallback | None) -> VerifyReport:
    entries = records.entries
    order = array("Q", sorted(range(len(entries)), key=lambda index: entries[index].header_offset))
    statuses = bytearray()
    problems: dict[str, None] = {}
    damaged = []
    num_unsound = 0
    for part, report in _parts(records, order, progress):
        try:
            crcs: list[int | str] = [*records.archive.checksums(part, progress=report)]
        except CorruptCheckpointError as e:
            # One record's header or stream is unsound: the others can still be told apart.
            problems[str(e)] = None
            crcs = [_checksum_or_problem(records, index) for index in part]
        for index, crc in zip(part, crcs, strict=True):
            status = _status(records, index, crc)
            statuses.append(_STATUSES.index(status))
            if status == "corrupt":
                num_unsound += 1
                if num_unsound <= MAX_RECORDS_SHOWN:
                    damaged.append(entries[index].name) if isinstance(crc, int) else problems.update({crc: None})
    for line in records.describe(damaged) if damaged else []:
        problems[f"{records.path}: {line}: its checksum does not match"] = None
    if num_unsound > MAX_RECORDS_SHOWN:
        problems[f"{records.path}: {num_unsound - MAX_RECORDS_SHOWN} more records are unsound"] = None
    if DATA_PKL not in records:
        problems[f"{records.path}: it has no record 'data.pkl': torch.save did not write this archive"] = None
    return VerifyReport(records.path, RecordReports(entries, order, statuses), [*problems])


def _parts(
    records: StoredRecords, order: Sequence[int], progress: ProgressCallback | None
) -> Iterator[tuple[list[int], ProgressCallback | None]]:
    """``order`` by parts whose results are no burden, and what reports the progress of each."""
    before, after = 0, sum(records.entries[index].nbytes for index in order)
    for begin in range(0, len(order), MAX_RECORDS_AT_ONCE):
        part = list(order[begin : begin + MAX_RECORDS_AT_ONCE])
        nbytes = sum(records.entries[index].nbytes for index in part)
        after -= nbytes
        yield part, progress and functools.partial(_report, progress, before, after)
        before += nbytes


def _report(progress: ProgressCallback, before: int, after: int, done: int, total: int) -> None:
    progress(before + done, before + total + after)


def _checksum_or_problem(records: StoredRecords, index: int) -> int | str:
    try:
        return records.archive.checksums([index], progress=None)[0]
    except CorruptCheckpointError as e:
        return str(e)


def _status(records: StoredRecords, index: int, crc: int | str) -> Status:
    if crc == records.entries[index].crc32:
        return "ok"
    return "corrupt" if isinstance(crc, str) or records.has_crc(index) else "crc-not-recorded"


def check_all(records: StoredRecords, progress: ProgressCallback | None = None) -> None:
    """As :func:`check`, for every record: before their bytes go into a format that has no checksums."""
    check(records, range(len(records.entries)), progress)


def check(records: StoredRecords, indices: Iterable[int], progress: ProgressCallback | None = None) -> None:
    """Compares the checksums of some records.

    Raises:
        CorruptCheckpointError: with all records that do not match, and their tensors.
    """
    order = array("Q", (index for index in indices if records.has_crc(index)))
    damaged = [
        records.entries[index].name
        for part, report in _parts(records, order, progress)
        for index, crc in zip(part, records.archive.checksums(part, progress=report), strict=True)
        if crc != records.entries[index].crc32
    ]
    if damaged:
        error = CorruptCheckpointError()
        error.records = tuple(damaged)
        raise records.explained(error)
