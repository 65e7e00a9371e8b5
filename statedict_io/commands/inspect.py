"""``statedict-io inspect FILE``: what is in a checkpoint. Of the tensors only those of one element are read."""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch

from ..reading.lazy.checkpoint import open_checkpoint
from ..untrusted.limits import MAX_SHOWN_CHARACTERS, shown
from .printing import json_number, nbytes_text, print_table, say

_MAX_SHOWN = 50  # other values that are printed
_MAX_VALUES = 1000  # that are told of
_MAX_READ = 1000  # tensors of one element: each takes a read
_MAX_BITS = 1024
# Whose repr tells all, and is no longer than they are.
_PLAIN = (bool, float, complex, type(None), torch.dtype, torch.device, torch.Size)


def run(path: str, *, as_json: bool) -> int:
    """Returns the exit code.

    Raises:
        OSError, StateDictIOError, pickle.UnpicklingError: as ``open_checkpoint``.
    """
    found = describe(path)
    if as_json:
        say(json.dumps(found, default=list))
        return 0
    rows = [
        [
            tensor["name"],
            tensor["dtype"],
            " x ".join(map(str, tensor["shape"])) or "scalar",
            str(tensor["nbytes"]),
            "-" if tensor["offset"] is None else str(tensor["offset"]),
            str(tensor.get("value", "")),
        ]
        for tensor in found["tensors"]
    ]
    columns = [("name", False), ("dtype", False), ("shape", True), ("bytes", True), ("offset", True), ("value", True)]
    if not any("value" in tensor for tensor in found["tensors"]):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(path, columns, rows)
    totals = found["totals"]
    say(f"{totals['tensors']} tensors, {totals['nbytes']} bytes ({nbytes_text(totals['nbytes'])}) in a file of "
          f"{found['file_nbytes']} bytes")  # fmt: skip
    say("by dtype: " + ", ".join(f"{dtype} {nbytes_text(n)}" for dtype, n in totals["by_dtype"].items()))
    if found["others"]:
        values = [f"{shown(name)} = {value}" for name, value in found["values"].items()]
        say(f"other values: {', '.join(values[:_MAX_SHOWN])}")
        if len(found["others"]) > _MAX_SHOWN:
            say(f"  and {len(found['others']) - _MAX_SHOWN} more")
    for name, needs in found["refused"].items():
        say(f"{found['refused_by']}: {name} (needs {', '.join(needs)})")
    say("format: " + ", ".join(f"{key.replace('_', ' ')} {v}" for key, v in found["format"].items()))
    return 0


def describe(path: str) -> dict[str, Any]:
    with open_checkpoint(path) as checkpoint:
        tensors: list[dict[str, Any]] = []
        num_read = 0
        by_dtype: dict[str, int] = {}
        for name in checkpoint:
            info = checkpoint.info(name)
            dtype = str(info.dtype).removeprefix("torch.")
            by_dtype[dtype] = by_dtype.get(dtype, 0) + info.nbytes
            tensors.append(
                {
                    "name": name,
                    "dtype": dtype,
                    "shape": list(info.shape),
                    "nbytes": info.nbytes,
                    "offset": info.offset,
                    "record": checkpoint.record(name),
                }
            )
            if info.nbytes == info.dtype.itemsize and checkpoint.is_plain(name) and num_read < _MAX_READ:
                num_read += 1
                tensors[-1]["value"] = _number(checkpoint[name])
        values = {name: _text(value) for name, value in itertools.islice(checkpoint.other_values(), _MAX_VALUES)}
        refused_by = "refused by torch's restricted unpickler" if checkpoint.stored_object else "cannot be read here"
        others = checkpoint.others
        refused = checkpoint.refused
        file_nbytes = checkpoint.nbytes
        facts = checkpoint.facts()
    return {
        "path": path,
        "file_nbytes": file_nbytes,
        "format": facts,
        "tensors": tensors,
        "totals": {"tensors": len(tensors), "nbytes": sum(t["nbytes"] for t in tensors), "by_dtype": by_dtype},
        "others": others,
        "values": values,
        "refused": refused,
        "refused_by": refused_by,
    }


def _number(tensor: torch.Tensor) -> Any:
    """The element of a tensor that has one, as JSON can hold it."""
    try:
        value = tensor.item()
    except (RuntimeError, NotImplementedError):  # of some dtypes torch makes no number
        return None
    return value if isinstance(value, (bool, int)) else json_number(value) if isinstance(value, float) else str(value)


def _text(value: Any) -> str:
    """What is shown of a value that is no tensor: all of a small one."""
    if isinstance(value, (str, bytes)):
        return shown(repr(value[:MAX_SHOWN_CHARACTERS])) + ("..." if len(value) > MAX_SHOWN_CHARACTERS else "")
    if type(value) is int:
        return str(value) if value.bit_length() <= _MAX_BITS else f"an integer of {value.bit_length()} bits"
    return shown(repr(value)) if isinstance(value, _PLAIN) else f"<{type(value).__name__}>"
