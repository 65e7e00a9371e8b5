"""``statedict-io diff [--trust] A B``: exit code 0 if their tensors are equal, 1 if they differ."""

from __future__ import annotations

import json
from typing import Any

from ..reading.lazy.checkpoint import TensorInfo
from ..reading.lazy.differences import Differences, TensorDifference, diff
from .printing import bar_wanted, json_number, print_table, say

_COLUMNS = [("name", False), ("differs", False), ("A", False), ("B", False), ("elements", True), ("max abs", True),
            ("max rel", True)]  # fmt: skip


def run(a: str, b: str, *, trust: bool, as_json: bool) -> int:
    """Returns the exit code.

    Raises:
        OSError, StateDictIOError, pickle.UnpicklingError: as :func:`statedict_io.diff`.
    """
    found = diff(a, b, weights_only=not trust, progress=True if bar_wanted() else None)
    if as_json:
        say(json.dumps(_described(a, b, found)))
    elif found.equal:
        say(f"{a}, {b}: {found.num_compared} tensor{'' if found.num_compared == 1 else 's'}, all equal")
    else:
        print_table(f"A: {a}, B: {b}", _COLUMNS, [_row(each) for each in found.differences])
        in_both = sum(each.what != "missing" for each in found.differences)
        say(f"{len(found.differences)} differ, {found.num_compared - in_both} are equal")
    return 0 if found.equal else 1


def _row(each: TensorDifference) -> list[str]:
    numbers = (each.num_different, each.max_abs, each.max_rel)
    return [each.name, each.what, _text(each.a), _text(each.b), *("-" if n is None else f"{n:.6g}" for n in numbers)]


def _text(info: TensorInfo | None) -> str:
    return "-" if info is None else f"{_dtype(info)} {' x '.join(map(str, info.shape)) or 'scalar'}"


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _described(a: str, b: str, found: Differences) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        "equal": found.equal,
        "compared": found.num_compared,
        "differences": [
            {
                "name": each.name,
                "what": each.what,
                "a": _fields(each.a),
                "b": _fields(each.b),
                "num_different": each.num_different,
                "max_abs": json_number(each.max_abs),
                "max_rel": json_number(each.max_rel),
            }
            for each in found.differences
        ],
    }


def _fields(info: TensorInfo | None) -> dict[str, Any] | None:
    return None if info is None else {"dtype": _dtype(info), "shape": list(info.shape)}
