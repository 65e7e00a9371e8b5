"""What reading costs, beside its peers and the raw limit: `python -m benchmarks.reading --out results.json`.

Each contender has a process of its own; they take turns, round by round. The first sample of each is kept apart. Ends
with what is asked of reading (docs/performance.md), and exits with 1 where a figure misses it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import program, results
from .cases import MIB, build, format_size
from .processes import BEFORE, WorkerProcess
from .reader import LIBRARIES
from .turns import rounds

OURS = "statedict_io"
OF_SAFETENSORS = ["statedict_io, .safetensors", "statedict_io, Python backend, .safetensors", "safetensors", "raw"]
DIFFS = ["statedict_io", "statedict_io, Python backend", "raw"]
LAZY = ["statedict_io", "statedict_io, Python backend", "torch.load mmap", "safetensors"]
#: (what a process of its own does, with which library, from .pt or from .safetensors)
MEMORY = [
    ("load", "statedict_io", ".pt"),
    ("load", "statedict_io, verify", ".pt"),
    ("load", "statedict_io, Python backend", ".pt"),
    ("load", "torch.load", ".pt"),
    ("verify", "statedict_io", ".pt"),
    ("verify", "statedict_io, Python backend", ".pt"),
    ("convert", "statedict_io", ".pt"),
    ("convert", "statedict_io", ".safetensors"),
]
ROW_ELEMENTS = 1024


class Reading:
    """Makes the files of a part and has the contenders take turns."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.options = options
        self.directory = directory

    def turns(
        self, names: list[str], num_rounds: int, order: Callable[[WorkerProcess], dict[str, float] | None]
    ) -> dict[str, Any]:
        names = [name for name in names if self.options.only is None or name in self.options.only]
        if self.options.before is not None:
            names += [BEFORE + name for name in names if name.startswith(OURS)]
        workers = {name: self.worker(name) for name in names}
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        try:
            for _, in_order, _ in rounds(names, num_rounds, self.options.seconds):
                for name in in_order:
                    sample = order(workers[name])
                    if sample is not None:
                        samples[name].append(sample)
        finally:
            for worker in workers.values():
                worker.close()
        return {
            name: {
                "status": workers[name].status,
                "reason": workers[name].reason,
                **results.measured(found),
            }
            for name, found in samples.items()
        }

    def worker(self, name: str) -> WorkerProcess:
        worker = WorkerProcess("reader", name, before=self.options.before)
        worker.wait_started()
        return worker

    def files(self, state: dict[str, Any]) -> dict[str, str]:
        """Saved in both formats, by the formats' own libraries; by suffix."""
        import torch

        paths = {suffix: str(self.directory / f"model{suffix}") for suffix in (".pt", ".safetensors")}
        torch.save(state, paths[".pt"])
        try:
            from safetensors.torch import save_file

            save_file(state, paths[".safetensors"])
        except ImportError:
            del paths[".safetensors"]
        return paths

    def load(self, case: str, cold: bool, rounds: int) -> dict[str, Any]:
        made = build(case, self.options.size)
        paths = self.files(made.state)
        nbytes, num_tensors = made.payload_nbytes, made.tensors
        del made
        of_pt = [name for name in LIBRARIES if name not in OF_SAFETENSORS[:2]]
        names = [name for name in of_pt if case == "llama" or name != "raw"]  # small tensors: not the disk's limit
        found = self.turns(names, rounds, lambda p: p.order("load", path=file_for(p, paths), cold=cold))
        return {"payload_bytes": nbytes, "tensors": num_tensors, "cold": cold, "contenders": found}

    def safetensors(self) -> dict[str, Any]:
        """Cold files of safetensors, until every page of what was loaded has been touched."""
        made = build("llama", self.options.size)
        paths = self.files(made.state)
        nbytes, num_tensors = made.payload_nbytes, made.tensors
        del made
        paths[".pt"] = paths[".safetensors"]  # the raw program reads any
        found = self.turns(
            OF_SAFETENSORS, self.options.rounds, lambda p: p.order("load", path=file_for(p, paths), cold=True)
        )
        return {"payload_bytes": nbytes, "tensors": num_tensors, "cold": True, "contenders": found}

    def diff(self) -> dict[str, Any]:
        """Two equal files."""
        made = build("llama", self.options.size)
        paths = self.files(made.state)
        nbytes, num_tensors = made.payload_nbytes, made.tensors
        del made
        other = paths[".pt"] + ".copy"
        shutil.copyfile(paths[".pt"], other)
        found = self.turns(DIFFS, self.options.rounds, lambda p: p.order("diff", a=paths[".pt"], b=other))
        return {"payload_bytes": 2 * nbytes, "tensors": num_tensors, "cold": True, "contenders": found}

    def first(self) -> dict[str, Any]:
        import torch

        numel = max(32, self.options.size // 1000 // 2)
        state = {f"layers.{i}.weight": torch.randint(-9, 9, (numel,), dtype=torch.int16) for i in range(1000)}
        paths = self.files(state)
        del state
        found = self.turns(
            LAZY,
            2 * self.options.rounds,
            lambda p: p.order("first_tensor", path=file_for(p, paths), name="layers.500.weight"),
        )
        return {"payload_bytes": 2000 * numel, "tensors": 1000, "cold": True, "contenders": found}

    def rows(self) -> dict[str, Any]:
        import torch

        num_rows = max(2048, self.options.size // 2 // (2 * ROW_ELEMENTS))
        state = {"weight": torch.randint(-9, 9, (num_rows, ROW_ELEMENTS), dtype=torch.int16)}
        paths = self.files(state)
        del state
        begin = num_rows // 3
        where = {"name": "weight", "begin": begin, "end": begin + MIB // (2 * ROW_ELEMENTS)}
        found = self.turns(LAZY, self.options.rounds, lambda p: p.order("rows", path=file_for(p, paths), **where))
        return {"tensor_bytes": 2 * num_rows * ROW_ELEMENTS, "cold": True, "contenders": found}

    def memory(self) -> dict[str, Any]:
        paths = self.files(build("llama", self.options.size).state)
        found: dict[str, Any] = {}
        for what, library, suffix in MEMORY:
            worker = self.worker(library)
            arguments = {"what": what, "path": paths.get(suffix, "")}
            if what == "convert":
                arguments["to"] = str(self.directory / ("out.safetensors" if suffix == ".pt" else "out.pt"))
            sample = worker.order("memory", **arguments)
            worker.close()
            found[f"{what} {suffix}, {library}"] = {
                "status": worker.status,
                "reason": worker.reason,
                "median": sample or {},
            }
        return {"contenders": found}


def file_for(worker: WorkerProcess, paths: dict[str, str]) -> str:
    return paths.get(worker.about.get("suffix", ""), "")  # a library that is not there has no format


PARTS: dict[str, Callable[[Reading], dict[str, Any]]] = {
    "cold": lambda reading: reading.load("llama", True, reading.options.rounds),
    "warm": lambda reading: reading.load("llama", False, reading.options.rounds),
    "many": lambda reading: reading.load("many20k", False, reading.options.rounds),
    "safetensors": Reading.safetensors,
    "diff": Reading.diff,
    "first": Reading.first,
    "rows": Reading.rows,
    "memory": Reading.memory,
}


def checks(document: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """(what, figure, what is wanted, met); of what was measured."""
    found: list[tuple[str, float, str, bool]] = []

    def median(part: str, name: str, field: str = "s") -> float | None:
        contenders = document["parts"].get(part, {}).get("contenders", {})
        value = contenders.get(name, {}).get("median", {}).get(field)
        return None if value is None else float(value)

    def ratio(part: str, over: str, under: str, least: float) -> None:
        a, b = median(part, over), median(part, under)
        if a is not None and b is not None:
            found.append((f"{part}: {over} / {under}", a / b, f">= {least:g}", a / b >= least))

    def most(what: str, value: float | None, limit: float, unit: str) -> None:
        if value is not None:
            found.append((f"{what}, {unit}", value, f"<= {limit:g}", value <= limit))

    for part in document["parts"]:  # with --before
        for name in document["parts"][part].get("contenders", {}):
            ratio(part, BEFORE + name, name, 0.97)
    ratio("cold", "raw", OURS, 0.9)
    ratio("cold", "torch.load", OURS, 2)
    ratio("cold", "safetensors", OURS, 1)
    ratio("cold", OURS, f"{OURS}, verify", 0.95)
    ratio("warm", "torch.load", OURS, 1.3)
    ratio("warm", OURS, f"{OURS}, verify", 0.95)
    ratio("many", "torch.load", OURS, 2)
    ratio("safetensors", "safetensors", "statedict_io, .safetensors", 1.3)
    ratio("diff", "raw", OURS, 0.9)
    for name in DIFFS[:2]:
        extra = median("diff", name, "extra_bytes")
        most(f"extra memory: diff, {name}", None if extra is None else extra / MIB, 160, "MiB")
    first = median("first", OURS)
    most("first tensor, cold", None if first is None else first * 1e3, 20, "ms")
    rows = median("rows", OURS, "read_bytes")
    most("1 MiB of rows: read from the disk", None if rows is None else rows / MIB, 2, "MiB")
    for name in document["parts"].get("memory", {}).get("contenders", {}):
        extra = median("memory", name, "extra_bytes")
        if "torch.load" not in name:
            most(f"extra memory: {name}", None if extra is None else extra / MIB, 160, "MiB")
    return found


def print_part(name: str, part: dict[str, Any]) -> None:
    facts = ", ".join(f"{key} {value}" for key, value in part.items() if key != "contenders")
    print(f"\n{name}: medians ({facts})" if facts else f"\n{name}")
    for key, entry in part["contenders"].items():
        median = entry["median"]
        if entry["status"] != "ok" or not median:
            print(f"  {key:44} {entry['status']}: {entry['reason']}")
            continue
        words = [f"{median['s'] * 1e3:9.1f} ms"] if "s" in median else []
        if entry.get("first"):
            words.append(f"first {entry['first']['s'] * 1e3:9.1f} ms")
        if "s" in median and "payload_bytes" in part and name != "first":
            words.append(f"{part['payload_bytes'] / 1e9 / median['s']:6.2f} GB/s")
        words += [
            f"{field.removesuffix('_bytes')} {format_size(int(median[field]))}"
            for field in ("read_bytes", "wanted_bytes", "extra_bytes")
            if field in median
        ]
        print(f"  {key:44} {'  '.join(words)}")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    document = program.document(options)
    document["parts"] = {}
    if options.add_to is not None and options.add_to.exists():
        document["parts"] = json.loads(options.add_to.read_text())["parts"]
    options.out = options.out or options.add_to
    with program.scratch(options.dir) as directory:
        reading = Reading(options, directory)
        for name in options.parts:
            document["parts"][name] = PARTS[name](reading)
            print_part(name, document["parts"][name])
            document["checks"] = [dict(zip(("what", "is", "wanted", "met"), c, strict=True)) for c in checks(document)]
            program.write(document, options)  # after each part: a later one may be cut short
    print()
    for what, value, wanted, met in checks(document):
        print(f"  {'' if met else 'MISSED: '}{what}: {value:.3g}, wanted {wanted}")
    broken = [
        f"{part}: {name}: {entry['reason']}"
        for part, found in document["parts"].items()
        for name, entry in found["contenders"].items()
        if entry["status"] == "failed"
    ]
    print(*broken, sep="\n", file=sys.stderr)
    missed = any(not met for _, _, _, met in checks(document))
    return 1 if broken or (missed and not options.smoke) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = program.Program("reading", __doc__, rounds=7)
    parser.add_before()
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--only", nargs="+", choices=list(LIBRARIES), help="these contenders")
    parser.add_argument("--add-to", type=Path, help="as --out, keeping the other parts that are in the file")
    return parser.options(arguments, size=4 * MIB)


if __name__ == "__main__":
    sys.exit(main())
