"""What is known of a checkpoint beside its bytes: a small JSON file next to it, ``NAME.json``.

It is written before its checkpoint, and says nothing without it. Where it announces the replacement of a checkpoint
that is there, it holds that one's facts too, and which file they are of: until the replacement has happened, these are
what counts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .folder import Folder

SUFFIX = ".json"
MAX_NBYTES = 1 << 16
_FORMAT = "statedict_io checkpoint 1"


@dataclass(frozen=True)
class Facts:
    """None: not known."""

    metric: float | None = None
    time: float | None = None  #: when the save began, seconds since the epoch
    wall_clock: str | None = None  #: the same moment for people, with the time zone's offset
    sha256: str | None = None  #: of the file's bytes, in hex
    protected: bool = False  #: never deleted by a rule

    @staticmethod
    def of_now(metric: float | None, *, protected: bool) -> Facts:
        now = time.time()
        wall_clock = datetime.fromtimestamp(now).astimezone().isoformat(timespec="seconds")
        return Facts(metric, now, wall_clock, protected=protected)


NOTHING_KNOWN = Facts()


def checked_metric(metric: Any) -> float | None:
    """A number, or what ``float()`` takes, such as a tensor of one element.

    Raises:
        TypeError, ValueError: it is none.
    """
    try:
        return None if metric is None else float(metric.detach() if hasattr(metric, "detach") else metric)
    except Exception as e:  # torch's are RuntimeErrors
        error = ValueError if isinstance(e, (ValueError, OverflowError)) else TypeError
        raise error(f"metric must be a number, a tensor of one element or None: {e}") from None


def read_facts(folder: Folder, name: str) -> Facts:
    """What is known of the checkpoint ``name``.

    Raises:
        OSError: the file is there and cannot be read.
    """
    return decoded(folder.read(name + SUFFIX, MAX_NBYTES), lambda: folder.version(name))


def encoded(step: int, facts: Facts, replaces: tuple[str, Facts] | None = None) -> bytes:
    """
    Args:
        replaces: the version of the file that is there, and its facts.
    """
    content: dict[str, Any] = {"format": _FORMAT, "step": step, **_fields(facts)}
    if replaces is not None:
        version, before = replaces
        content["replaces"] = {"version": version, **_fields(before)}
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def decoded(data: bytes | None, version: Callable[[], str | None]) -> Facts:
    """What the file of facts says of the checkpoint that is there; nothing where it is damaged, or not ours.

    Args:
        data: None where there is no such file.
        version: of the checkpoint; asked only where it matters.
    """
    try:
        content = json.loads(data or b"")
    except (ValueError, RecursionError):
        return NOTHING_KNOWN
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        return NOTHING_KNOWN
    before = content.get("replaces")
    if isinstance(before, dict) and before.get("version") == version():
        return _facts(before)
    return _facts(content)


def _fields(facts: Facts) -> dict[str, Any]:
    fields = dataclasses.asdict(facts)
    if facts.metric is not None and not math.isfinite(facts.metric):
        fields["metric"] = str(facts.metric)  # JSON has no such numbers
    return fields


def _facts(content: dict[str, Any]) -> Facts:
    wall_clock, sha256 = content.get("wall_clock"), content.get("sha256")
    return Facts(
        _number(content.get("metric")),
        _number(content.get("time")),
        wall_clock if isinstance(wall_clock, str) else None,
        sha256 if isinstance(sha256, str) else None,
        content.get("protected") is True,
    )


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
