"""``statedict-io verify FILE...``: exit code 0 if all are sound, 1 if one is corrupt, else 2 if one cannot be read or
is no checkpoint."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ..errors import StateDictIOError
from ..reading.verification import VerifyReport, verify
from .printing import bar_wanted, complain, nbytes_text, say


def run(paths: list[str], *, as_json: bool) -> int:
    """Returns the exit code."""
    codes = set()
    found = []
    for path in paths:
        try:
            report = verify(path, progress=True if bar_wanted() else None)
        except (OSError, StateDictIOError) as e:
            complain(str(e))
            codes.add(2)
            found.append({"path": path, "ok": False, "error": str(e)})
            continue
        codes.add(0 if report.ok else 1 if report.is_known else 2)
        if as_json:
            found.append(_described(report))
        else:
            _print(path, report)
    if as_json:
        say(json.dumps(found))
    return 1 if 1 in codes else max(codes, default=0)


def _described(report: VerifyReport) -> dict[str, Any]:
    fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    return {**fields, "records": [dataclasses.asdict(record) for record in report.records], "ok": report.ok}


_COMPARED = {
    "none": ", structure alone: it has no checksums, and none are beside it",
    "sha256": ", its SHA-256 is the one that was recorded",
}


def _print(path: str, report: VerifyReport) -> None:
    if report.ok:
        unrecorded = sum(record.status == "crc-not-recorded" for record in report.records)
        note = f", {unrecorded} of them without a recorded CRC" if unrecorded else _COMPARED.get(report.checksums, "")
        nbytes = sum(record.nbytes for record in report.records)
        what = "records" if report.checksums == "crc32" else "tensors"
        say(f"{path}: ok, {len(report.records)} {what}, {nbytes_text(nbytes)}{note}")
    for problem in report.problems:
        say(problem)
