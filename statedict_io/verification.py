"""``verify``: whether the bytes of a checkpoint are those that were saved. Unpickles nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from . import progress as progress_module
from .archives import DATA_PKL, Records, check_kind, opened
from .backends.protocol import RecordEntry
from .errors import CorruptCheckpointError, UnknownKindError
from .progress import Progress, ProgressCallback
from .reading import kinds

Status = Literal["ok", "corrupt", "crc-not-recorded"]


@dataclass(frozen=True)
class RecordReport:
    """One record of a checkpoint, such as ``data/0``."""

    name: str  #: without the archive's name
    nbytes: int  #: of the payload, uncompressed
    status: Status  #: "ok", "corrupt", or "crc-not-recorded" where the file was saved with CRCs off


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found."""

    path: str  #: as given
    records: list[RecordReport]  #: in file order; empty where the file is no archive
    problems: list[str]  #: a line each, for people; names the tensors that live in a corrupt record
    is_known: bool = (
        True  #: False: nothing tells what kind of file it is, so whether it is a damaged checkpoint is open
    )

    @property
    def ok(self) -> bool:
        """No problem was found. Records without a recorded CRC are none."""
        return not self.problems


def verify(path: Any, *, backend: str = "auto", progress: Progress = None) -> VerifyReport:
    """Reads the whole file and compares the CRC-32 of each record with the recorded one.

    Args:
        path: of a file in torch's zip format (a TorchScript archive is one too), or a URL of fsspec (``str``).
        backend: ``"auto"``, ``"native"`` or ``"torch"``, as for :func:`load`.
        progress: ``True`` for a bar on stderr (needs ``tqdm``), or a callable taking (bytes_done, bytes_total).

    Returns:
        A report, also for a file whose structure is damaged.

    Raises:
        OSError: the file cannot be read.
        FileKindError: it is no archive of ``torch.save`` but a file of another kind, such as torch's legacy format or
            safetensors, which record no checksums; names the kind.
        NativeUnavailableError: ``backend="native"`` and the extension cannot be used.

    Example:
        >>> sio.save({"w": torch.zeros(3)}, "weights.pt")
        >>> sio.verify("weights.pt").ok
        True
    """
    progress_module.check(progress)
    try:
        with opened(path, backend) as records, progress_module.reporting(progress, "verify") as callback:
            check_kind(records, allowed=(kinds.TORCHSCRIPT, kinds.MOBILE))  # whose records are checked like others
            return _verify(records, callback)
    except CorruptCheckpointError as e:
        return VerifyReport(str(path), [], [str(e)], is_known=not isinstance(e, UnknownKindError))


def _verify(records: Records, progress: ProgressCallback | None) -> VerifyReport:
    entries = records.entries
    order = sorted(range(len(entries)), key=lambda index: entries[index].header_offset)
    problems = []
    try:
        crcs = dict(zip(order, records.archive.checksums(order, progress=progress), strict=True))
    except CorruptCheckpointError as e:
        # One record's header or stream is unsound: the others can still be told apart.
        problems.append(str(e))
        crcs = _checksums_one_by_one(records, order, problems)
    recorded = records.with_crc
    reports = [
        RecordReport(entries[index].name, entries[index].nbytes, _status(entries[index], crcs.get(index), recorded))
        for index in order
    ]
    damaged = [
        index for index in order if index in crcs and _status(entries[index], crcs[index], recorded) == "corrupt"
    ]
    for line in records.describe([entries[index].name for index in damaged]) if damaged else []:
        problems.append(f"{records.path}: {line}: its checksum does not match")
    if DATA_PKL not in records:
        problems.append(f"{records.path}: it has no record 'data.pkl': torch.save did not write this archive")
    return VerifyReport(records.path, reports, list(dict.fromkeys(problems)))


def _checksums_one_by_one(records: Records, order: list[int], problems: list[str]) -> dict[int, int]:
    crcs = {}
    for index in order:
        try:
            crcs[index] = records.archive.checksums([index], progress=None)[0]
        except CorruptCheckpointError as e:
            problems.append(str(e))
    return crcs


def _status(entry: RecordEntry, crc: int | None, recorded: frozenset[str]) -> Status:
    if crc is None:
        return "corrupt"
    if crc == entry.crc32:
        return "ok"
    return "corrupt" if entry.name in recorded else "crc-not-recorded"


def check(records: Records, indices: Iterable[int], progress: ProgressCallback | None = None) -> None:
    """Compares the checksums of some records.

    Raises:
        CorruptCheckpointError: with all records that do not match, and their tensors.
    """
    order = [index for index in indices if records.entries[index].name in records.with_crc]
    crcs = records.archive.checksums(order, progress=progress)
    damaged = [
        records.entries[index].name
        for index, crc in zip(order, crcs, strict=True)
        if crc != records.entries[index].crc32
    ]
    if damaged:
        error = CorruptCheckpointError()
        error.records = tuple(damaged)
        raise records.explained(error)
