"""``statedict-io inspect FILE``: what is in a checkpoint, without reading a tensor."""

from __future__ import annotations

import json
from typing import Any

from ..reading.lazy.checkpoint import open_checkpoint
from ..untrusted.limits import listed
from .printing import nbytes_text, print_table, say

_FACTS = (".format_version", ".storage_alignment", "byteorder", "version", ".data/serialization_id")


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
        ]
        for tensor in found["tensors"]
    ]
    columns = [("name", False), ("dtype", False), ("shape", True), ("bytes", True), ("offset", True)]
    print_table(path, columns, rows)
    totals = found["totals"]
    say(f"{totals['tensors']} tensors, {totals['nbytes']} bytes ({nbytes_text(totals['nbytes'])}) in a file of "
          f"{found['file_nbytes']} bytes")  # fmt: skip
    say("by dtype: " + ", ".join(f"{dtype} {nbytes_text(n)}" for dtype, n in totals["by_dtype"].items()))
    if found["others"]:
        say(f"other values: {listed(found['others'])}")
    for name, needs in found["refused"].items():
        say(f"refused by torch's restricted unpickler: {name} (needs {', '.join(needs)})")
    say("format: " + ", ".join(f"{key.replace('_', ' ')} {v}" for key, v in found["format"].items()))
    return 0


def describe(path: str) -> dict[str, Any]:
    with open_checkpoint(path) as checkpoint:
        tensors = []
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
        others = checkpoint.others
        records = checkpoint.records
        indices = [index for index, entry in enumerate(records.entries) if entry.nbytes]
        num_recorded = sum(map(records.has_crc, indices))
        file_nbytes = records.file_nbytes
        facts: dict[str, Any] = {
            "archive_name": records.archive.archive_name,
            "records": len(records.entries),
            "compressed_records": sum(records.entries[index].compressed for index in indices),
            "crc": "recorded"
            if num_recorded == len(indices)
            else "partly recorded"
            if num_recorded
            else "not recorded",
        }
        for name in _FACTS:
            if name in records and records.entry(name).nbytes <= 4096:
                facts[name.rpartition("/")[2].lstrip(".")] = records.read(name).decode(errors="replace").strip()
    return {
        "path": path,
        "file_nbytes": file_nbytes,
        "format": facts,
        "tensors": tensors,
        "totals": {"tensors": len(tensors), "nbytes": sum(t["nbytes"] for t in tensors), "by_dtype": by_dtype},
        "others": others,
        "refused": checkpoint.refused,
    }
