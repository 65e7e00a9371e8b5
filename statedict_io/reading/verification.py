"""``verify``: whether the bytes of a file are those that were saved. Unpickles nothing."""

from __future__ import annotations

import functools
import os
import pickle
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .. import progress as progress_module
from ..archive.record_entry import RecordEntry
from ..errors import CorruptCheckpointError, FileKindError, UnknownKindError, corrupt
from ..formats import kinds, safetensors_parsed
from ..progress import Progress, ProgressCallback, over_parts
from ..remote.urls import is_url
from ..untrusted.limits import MAX_RECORDS_AT_ONCE, MAX_RECORDS_SHOWN
from ..untrusted.on_demand import OnDemand
from . import legacy_file
from .opened_bytes import OpenedBytes, open_bytes
from .records import DATA_PKL, StoredRecords, check_kind, kind_of, records_in
from .safetensors_payloads import open_safetensors
from .sidecars import Expected, expected_sha256, sha256_of
from .weight_folders import Shards, is_folder, shards_of, sizes_of, weights_in

Status = Literal["ok", "corrupt", "crc-not-recorded", "no-checksums"]
_STATUSES: tuple[Status, ...] = ("ok", "corrupt", "crc-not-recorded", "no-checksums")


@dataclass(frozen=True)
class RecordReport:
    """One record of a checkpoint, such as ``data/0``, or a tensor of a file in a format without records."""

    name: str  #: without the archive's name; of a shard with the shard's file name and a colon before it
    nbytes: int  #: of the payload, uncompressed
    #: "ok", "corrupt", "crc-not-recorded" where the file was saved with CRCs off, or "no-checksums" where its format
    #: has none and nothing beside it has either
    status: Status


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
    #: what was compared: "crc32" of each record, the "sha256" of the file, or "none", where only the structure was
    checksums: str = "crc32"

    @property
    def ok(self) -> bool:
        """No problem was found. A record without a recorded CRC is not a problem."""
        return not self.problems


def verify(path: Any, *, backend: str = "auto", progress: Progress = None) -> VerifyReport:
    """Tells whether a file is sound, by whatever it can be compared with.

    - An archive of ``torch.save`` is read as a whole, and the CRC-32 of each record compared with the recorded one.
    - Safetensors files, and torch's formats before 1.6, have no checksums: the structure is checked. Where the SHA-256
      is in ``FILE.sha256`` or ``SHA256SUMS`` beside it, or huggingface_hub has kept it, the file is read as a whole
      and compared.
    - Of a folder, or an index, each shard is verified, and that it has the tensors that the index says.
    - A directory of ``torch.distributed.checkpoint`` consists of archives of ``torch.save``: each is verified.

    Args:
        path: of a file (a TorchScript archive is one in torch's zip format too), a folder of weights, or an index of
            shards; or a URL of fsspec (``str``), beside which nothing is looked for.
        backend: ``"auto"``, ``"native"`` or ``"python"``, as for :func:`load`.
        progress: ``True`` for a bar on stderr (needs ``tqdm``), or a callable taking (bytes_done, bytes_total).

    Returns:
        A report, also for a file whose structure is damaged.

    Raises:
        OSError: the file cannot be read.
        FileKindError: it is a file of another kind; names the kind.
        NativeUnavailableError: ``backend="native"`` and the extension cannot be used.
        TypeError: an option is of a wrong type; names it.

    Example:
        >>> sio.save({"w": torch.zeros(3)}, "weights.pt")
        >>> sio.verify("weights.pt").ok
        True
    """
    progress_module.check(progress)
    with progress_module.reporting(progress, "verify") as callback:
        return _verified(path, backend, callback, may_be_several=True)


def _verified(
    path: Any, backend: str, progress: ProgressCallback | None, *, may_be_several: bool, index: str | None = None
) -> VerifyReport:
    """``index``: that names the file."""
    given = path if is_url(path) else os.fsdecode(path)
    try:
        found = weights_in(given) if may_be_several and is_folder(given) else given
        with open_bytes(found, backend) as opened:
            kind = kind_of(opened)
            if kind is None:
                return _verify_archive(opened, progress)
            if kind in _ENTRIES:
                return _verify_structure(opened, found, _ENTRIES[kind](opened), progress, index)
            if kind is kinds.DCP_METADATA and may_be_several:
                return _verify_dcp(opened, found, given, backend, progress)
            shards = shards_of(opened, found) if kind is kinds.JSON and may_be_several else None
            if shards is None:
                raise FileKindError(f"{opened.name}: {kind}")
        return _verify_shards(given, shards, backend, progress)
    except CorruptCheckpointError as e:
        return VerifyReport(str(path), [], [str(e)], is_known=not isinstance(e, UnknownKindError))


def _verify_archive(opened: OpenedBytes, progress: ProgressCallback | None) -> VerifyReport:
    records = records_in(opened)
    check_kind(records, allowed=(kinds.TORCHSCRIPT, kinds.MOBILE))  # whose records are checked like others
    return _verify(records, progress)


def _entries_of_safetensors(opened: OpenedBytes) -> Sequence[RecordEntry]:
    return open_safetensors(opened).payloads.entries


def _entries_of_legacy(opened: OpenedBytes) -> Sequence[RecordEntry]:
    file = legacy_file.parse(opened)
    try:
        said = legacy_file.said_without_unpickling(file)
    except ValueError as e:
        raise corrupt(opened.name, str(e)) from None
    return legacy_file.entries(opened, file, said)


def _entries_of_tar(opened: OpenedBytes) -> Sequence[RecordEntry]:
    members = legacy_file.tar_members(opened)
    return [RecordEntry(name, 0, nbytes, nbytes, 0, False) for name, nbytes in members.items()]


# Formats without checksums. Each of these raises CorruptCheckpointError where the structure is not sound.
_ENTRIES: dict[kinds.FileKind | None, Callable[[OpenedBytes], Sequence[RecordEntry]]] = {
    kinds.SAFETENSORS: _entries_of_safetensors,
    kinds.LEGACY: _entries_of_legacy,
    kinds.TAR: _entries_of_tar,
}


def _verify_structure(
    opened: OpenedBytes,
    path: str,
    entries: Sequence[RecordEntry],
    progress: ProgressCallback | None,
    index: str | None,
) -> VerifyReport:
    """Of a file whose structure is sound."""
    expected, problems = _compared_sum(opened, path, progress, index)
    status = _STATUSES.index("no-checksums" if expected is None or problems else "ok")
    return VerifyReport(
        opened.name,
        RecordReports(entries, array("Q", range(len(entries))), bytearray([status]) * len(entries)),
        problems,
        checksums="none" if expected is None else "sha256",
    )


def _compared_sum(
    opened: OpenedBytes, path: str, progress: ProgressCallback | None, index: str | None = None
) -> tuple[Expected | None, list[str]]:
    """What is said of the SHA-256 of a file, and what is wrong with that."""
    try:
        expected = None if is_url(path) else expected_sha256(path, index)
    except ValueError as e:
        return None, [str(e)]
    if expected is not None and (found := sha256_of(opened, progress)) != expected.sha256:
        said = f"its SHA-256 is {found}; by {expected.said_by} it should be {expected.sha256}"
        return expected, [f"{opened.name}: {said}"]
    return expected, []


def _verify_shards(path: str, shards: Shards, backend: str, progress: ProgressCallback | None) -> VerifyReport:
    reports = []
    with open_bytes(shards.path, backend) as opened:
        _, problems = _compared_sum(opened, shards.path, None)
    parts = over_parts(progress, sizes_of(shards.paths))
    for index, (shard, part) in enumerate(zip(shards.paths, parts, strict=True)):
        try:
            report = _verified(shard, backend, part, may_be_several=False, index=shards.path)
        except FileNotFoundError:
            problems.append(f"{shard}: is missing; {shards.path} names it")
            continue
        reports.append(report)
        problems += report.problems
        if report.ok:
            problems += _names_problem(shards, index, backend)
    named = [(os.path.basename(report.path), report) for report in reports]
    return VerifyReport(
        path,
        [replace(record, name=f"{shard}:{record.name}") for shard, report in named for record in report.records],
        problems,
        checksums=", ".join(dict.fromkeys(report.checksums for report in reports)) or "none",
    )


def _verify_dcp(
    opened: OpenedBytes, path: str, given: str, backend: str, progress: ProgressCallback | None
) -> VerifyReport:
    """Of a directory of torch.distributed.checkpoint, each of whose parts is an archive."""
    from .dcp_folder import DCPFolder  # imports torch.distributed

    try:
        folder = DCPFolder(opened, path, backend, weights_only=True)
    except pickle.UnpicklingError as e:
        return VerifyReport(given, [], [str(e)])
    parts = [*folder.parts()]
    records = []
    problems: dict[str, None] = {}
    for part, report_part in zip(parts, over_parts(progress, [part.nbytes for part in parts]), strict=True):
        try:
            report = _verify(records_in(folder.open(part)), report_part)
        except FileNotFoundError:
            problems[f"{folder.path_of(part)}: is missing; {path} names it"] = None
        except (CorruptCheckpointError, FileKindError) as e:
            problems[str(e)] = None
        else:
            records += [replace(record, name=f"{part.whole}:{record.name}") for record in report.records]
            problems |= dict.fromkeys(report.problems)
    folder.close()
    return VerifyReport(given, records, [*problems])


def _names_problem(shards: Shards, index: int, backend: str) -> list[str]:
    """What is wrong with the names of the tensors in a sound shard."""
    try:
        with open_bytes(shards.paths[index], backend) as opened:
            shards.check(index, _names_in(opened))
    except CorruptCheckpointError as e:
        return [str(e)]
    return []


def _names_in(opened: OpenedBytes) -> list[str]:
    """Of the tensors in a file, without unpickling it."""
    if kind_of(opened) is kinds.SAFETENSORS:
        return [*safetensors_parsed.parse(opened.read_at, opened.nbytes, opened.name).tensors]
    from ..names.tensors_of_records import tensors_by_record

    tensors = tensors_by_record(records_in(opened).read(DATA_PKL), opened.nbytes)
    return [name for names in tensors.values() for name in names]


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
