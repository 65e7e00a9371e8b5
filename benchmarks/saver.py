"""What a worker of `benchmarks.run` does: build a case, save it, load it, check it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import measure
from .cases import Case, build
from .contenders import ALL, Contender
from .contenders.base import Unsupported, flat_tensors


def start(key: str, device: str, op: str) -> Saver:
    kind = ALL[key]
    on_cpu = kind.device_only and device == "cpu"
    reason = "the tensors are on the CPU" if on_cpu else kind.available(op)
    if reason is not None:
        raise Unsupported(reason)
    return Saver(kind(device))


class Saver:
    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.about = contender.about()
        self.case: Case | None = None
        self.ready_rss: int | None = None

    def do_build(self, case: str, nbytes: int, payload_nbytes: int | None) -> dict[str, Any]:
        """`payload_nbytes` is what the others' case came to; the raw ones take it instead of building their own."""
        self.case = None
        if self.contender.needs_state:
            self.case = build(case, nbytes, self.contender.device)
            measure.synchronize_device(self.contender.device)
        else:
            self.case = Case({}, nbytes if payload_nbytes is None else payload_nbytes, 0)
        self.contender.prepare(self.case.payload_nbytes)
        self.ready_rss = measure.resident_nbytes(self.contender.processes())
        return {"payload_bytes": self.case.payload_nbytes, "tensors": self.case.tensors}

    def do_save(self, path: str, overwrite: bool, touch: bool, heartbeat: bool = False) -> dict[str, Any]:
        assert self.case is not None
        if not overwrite:
            self.contender.remove(Path(path))
        os.sync()
        if touch:
            measure.touch_free_memory(self.case.payload_nbytes * 5 // 4)
        return measure.timed_save(self.contender, self.case.state, Path(path), self.ready_rss, heartbeat=heartbeat)

    def do_load(self, path: str, cold: bool) -> dict[str, Any]:
        os.sync()
        return measure.timed_load(self.contender, Path(path), cold)

    def do_check(self, path: str) -> dict[str, Any]:
        """Reads the file back and compares it with what was saved, bit by bit."""
        if not (self.contender.needs_state and self.contender.writes_file):
            return {"checked": "nothing to read back"}
        assert self.case is not None
        differences = tree_differences(self.case.state, self.contender.read_back(Path(path)))
        if differences:
            raise AssertionError(f"what was read back differs: {differences[:5]}")
        return {"checked": "equal"}

    def do_remove(self, path: str) -> dict[str, Any]:
        self.contender.remove(Path(path))
        return {}

    def close(self) -> None:
        self.contender.close()


def tree_differences(saved: dict[str, Any], loaded: dict[str, Any]) -> list[str]:
    import torch

    want, got = flat_tensors(saved), flat_tensors(loaded)
    differences = sorted(want.keys() ^ got.keys())
    for name in want.keys() & got.keys():
        a, b = want[name], got[name]
        same = a.dtype == b.dtype and a.shape == b.shape
        # As bytes: random bits hold NaNs, which equal nothing.
        if not same or not torch.equal(_as_bytes(a), _as_bytes(b.to(a.device))):
            differences.append(name)
    return differences


def _as_bytes(tensor: Any) -> Any:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
