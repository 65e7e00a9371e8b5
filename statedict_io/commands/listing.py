"""``statedict-io list DIR``: what is there, and whether it is sound."""

from __future__ import annotations

import json
import os
import time
from typing import Any, Literal

from ..checkpoints.entry import SavedCheckpoint
from .opened_directory import opened
from .printing import json_number, nbytes_text, print_table, say

Level = Literal["digest", "crc", "structure", "none"]
_COLUMNS = [("step", True), ("metric", True), ("size", True), ("age", True), ("sound", False), ("file", False)]


def run(path: str, pattern: str | None, *, verify: Level, as_json: bool) -> int:
    """Returns the exit code: 1 where a checkpoint is damaged.

    Raises:
        OSError, StateDictIOError, ValueError: as of ``CheckpointDirectory``.
    """
    found = []
    with opened(path, pattern) as ckpts:
        for each in ckpts:
            try:
                found.append(_described(each, verify))
            except FileNotFoundError:  # deleted meanwhile
                continue
    if as_json:
        say(json.dumps([{**each, "metric": json_number(each["metric"])} for each in found]))
    elif not found:
        say(f"{path}: no checkpoints")
    else:
        print_table(path, _COLUMNS, [_row(each) for each in found])
        for problem in filter(None, (each["problem"] for each in found)):
            say(problem)
    return 1 if any(each["problem"] for each in found) else 0


def _described(each: SavedCheckpoint, verify: Level) -> dict[str, Any]:
    return {
        "step": each.step,
        "path": each.path,
        "metric": each.metric,
        "nbytes": each.nbytes,
        "time": each.saved_at,
        "wall_clock": each.wall_clock,
        "sha256": each.sha256,
        "protected": each.protected,
        "verified": verify,
        "problem": each.problem(verify=False if verify == "none" else verify),
    }


def _row(each: dict[str, Any]) -> list[str]:
    sound = "no" if each["problem"] else {"structure": "structure", "none": "?"}.get(each["verified"], "yes")
    return [
        str(each["step"]),
        "-" if each["metric"] is None else f"{each['metric']:.6g}",
        nbytes_text(each["nbytes"]),
        "-" if each["time"] is None else _age_text(time.time() - each["time"]),
        sound + (", protected" if each["protected"] else ""),
        os.path.basename(each["path"]),
    ]


def _age_text(seconds: float) -> str:
    for unit, unit_seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= unit_seconds:
            return f"{seconds / unit_seconds:.1f} {unit}"
    return f"{max(seconds, 0):.0f} s"
