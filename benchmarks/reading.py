"""What reading costs, beside its peers and the raw limit: `python -m benchmarks.reading --out results.json`.

Each contender has a process of its own; they take turns, round by round. The first sample of each is kept apart. Ends
with what is asked of reading (docs/performance.md), and exits with 1 where a figure misses it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import environment
from .cases import GIB, MIB, build, format_size, parse_size
from .processes import BEFORE, checkout, start_worker
from .reading_worker import LIBRARIES
from .turns import in_turn

OURS = "statedict_io"
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


class Process:
    """One contender; `status` says why it takes no part (any more)."""

    def __init__(self, name: str, before: Path | None = None) -> None:
        self._process = start_worker("reading_worker", name, before=before, stderr=subprocess.DEVNULL)
        answer = self._read()
        self.status = answer.get("skipped", answer.get("failed", "ok"))
        self.suffix = answer.get("suffix", ".pt")

    def order(self, do: str, **arguments: Any) -> dict[str, float] | None:
        if self.status != "ok":
            return None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        if "failed" in answer:
            self.status = f"FAILED: {answer['failed']}"
            return None
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"failed": f"the process ended with {self._process.wait()}"}


class Reading:
    """Makes the files of a part and has the contenders take turns."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.options = options
        self.directory = directory

    def turns(
        self, names: list[str], rounds: int, order: Callable[[Process], dict[str, float] | None]
    ) -> dict[str, Any]:
        names = [name for name in names if self.options.only is None or name in self.options.only]
        if self.options.before is not None:
            names += [BEFORE + name for name in names if name.startswith(OURS)]
        processes = {name: Process(name, self.options.before) for name in names}
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
        start = time.monotonic()
        try:
            keys = list(processes)
            for number in range(rounds + 1):
                if number > 1 and time.monotonic() - start > self.options.seconds:
                    break
                for name in in_turn(keys, number):
                    sample = order(processes[name])
                    if sample is not None:
                        samples[name].append(sample)
        finally:
            for process in processes.values():
                process.close()
        return {
            name: {
                "status": processes[name].status,
                "first": found[0] if found else None,
                "samples": found[1:],
                "median": {field: statistics.median(s[field] for s in found[1:]) for field in found[0]}
                if len(found) > 1
                else {},
            }
            for name, found in samples.items()
        }

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
        names = [name for name in LIBRARIES if case == "llama" or name != "raw"]  # small tensors: not the disk's limit
        found = self.turns(names, rounds, lambda p: p.order("load", path=paths[p.suffix], cold=cold))
        return {"payload_bytes": nbytes, "tensors": num_tensors, "cold": cold, "contenders": found}

    def first(self) -> dict[str, Any]:
        import torch

        numel = max(32, self.options.size // 1000 // 2)
        state = {f"layers.{i}.weight": torch.randint(-9, 9, (numel,), dtype=torch.int16) for i in range(1000)}
        paths = self.files(state)
        del state
        found = self.turns(
            LAZY,
            2 * self.options.rounds,
            lambda p: p.order("first_tensor", path=paths[p.suffix], name="layers.500.weight"),
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
        found = self.turns(LAZY, self.options.rounds, lambda p: p.order("rows", path=paths[p.suffix], **where))
        return {"tensor_bytes": 2 * num_rows * ROW_ELEMENTS, "cold": True, "contenders": found}

    def memory(self) -> dict[str, Any]:
        paths = self.files(build("llama", self.options.size).state)
        found: dict[str, Any] = {}
        for what, library, suffix in MEMORY:
            process = Process(library)
            arguments = {"what": what, "path": paths.get(suffix, "")}
            if what == "convert":
                arguments["to"] = str(self.directory / ("out.safetensors" if suffix == ".pt" else "out.pt"))
            sample = process.order("memory", **arguments)
            process.close()
            found[f"{what} {suffix}, {library}"] = {"status": process.status, "median": sample or {}}
        return {"contenders": found}


PARTS: dict[str, Callable[[Reading], dict[str, Any]]] = {
    "cold": lambda reading: reading.load("llama", True, reading.options.rounds),
    "warm": lambda reading: reading.load("llama", False, reading.options.rounds),
    "many": lambda reading: reading.load("many20k", False, reading.options.rounds),
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
            print(f"  {key:44} {entry['status']}")
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
    directory = Path(tempfile.mkdtemp(prefix="statedict-io-bench-", dir=options.dir))
    document = environment.describe(directory, "cpu")
    command = ["python", "-m", "benchmarks.reading", *(sys.argv[1:] if arguments is None else arguments)]
    document["settings"] = {"command": command, "rounds": options.rounds}
    document["parts"] = {}
    if options.add_to is not None and options.add_to.exists():
        document["parts"] = json.loads(options.add_to.read_text())["parts"]
    options.out = options.out or options.add_to
    try:
        reading = Reading(options, directory)
        for name in options.parts:
            document["parts"][name] = PARTS[name](reading)
            print_part(name, document["parts"][name])
            document["checks"] = [dict(zip(("what", "is", "wanted", "met"), c, strict=True)) for c in checks(document)]
            if options.out is not None:  # after each part: a later one may be cut short
                options.out.write_text(json.dumps(document, indent=1))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print()
    for what, value, wanted, met in checks(document):
        print(f"  {'' if met else 'MISSED: '}{what}: {value:.3g}, wanted {wanted}")
    broken = [
        f"{part}: {name}: {entry['status']}"
        for part, found in document["parts"].items()
        for name, entry in found["contenders"].items()
        if entry["status"].startswith(("FAILED", "the process"))
    ]
    print(*broken, sep="\n", file=sys.stderr)
    missed = any(not met for _, _, _, met in checks(document))
    return 1 if broken or (missed and not options.smoke) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--only", nargs="+", choices=list(LIBRARIES), help="these contenders")
    parser.add_argument("--size", type=parse_size, default=GIB, help="payload; half of it for the tensor of `rows`")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds after the first")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of a part: no new round after that long")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="whose file system is measured")
    parser.add_argument(
        "--before", type=checkout, metavar="DIR", help="a checkout, built in place, that takes part too"
    )
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    parser.add_argument("--add-to", type=Path, help="the same, keeping the other parts that are in the file")
    parser.add_argument("--smoke", action="store_true", help="tiny, one round: does everything run?")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.size, options.rounds = 4 * MIB, 1
    return options


if __name__ == "__main__":
    sys.exit(main())
