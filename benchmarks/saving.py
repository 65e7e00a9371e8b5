"""What is asked of saving, measured: `python -m benchmarks.saving --out results.json`.

Runs the cases of `benchmarks.run` that the questions are about, ends with what is asked (docs/performance.md), and
exits with 1 where a figure misses it. Some ratios to `torch.save` ask for more than a disk may have: beside those
stands what the raw limit itself has in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import program, results, run
from .cases import GIB, KIB, MIB, format_size, parse_size
from .processes import BEFORE

TMPFS = Path("/dev/shm")
OURS = ("native", "native_nodurable")
FULL = "torch,torch_nocrc,native,native_nodurable,raw_buffered,raw_direct"
SWEEP = "torch_nocrc,torch_atomic,native,native_nodurable"
SAFETENSORS = "safetensors,safetensors_fsync,native_safetensors,native_safetensors_nodurable,raw_direct"
#: Arguments of benchmarks.run; {size} and {seconds} are this program's.
PARTS = {
    "llama": f"--case llama --size {{size}} --seconds {{seconds}} --contenders {FULL}",
    "adamw": f"--case adamw --size {{size}} --seconds {{seconds}} --contenders {FULL}",
    "sweep": f"--case sweep --size {{size}} --seconds {{seconds}} --contenders {SWEEP}",
    "large": "--case one --size {large} --seconds {seconds} --contenders torch_nocrc,native_nodurable",
    "large durable": "--case one --size {large} --seconds {seconds} --contenders torch_atomic,native",
    "many": "--case many20k,many100k --seconds {seconds} --contenders torch,native,native_nodurable",
    "tmpfs": "--case llama --size {size} --seconds {seconds} --contenders native,native_nodurable,raw_buffered",
    "safetensors": f"--case llama --size {{size}} --seconds {{seconds}} --contenders {SAFETENSORS}",
    "digest": "--case llama --size {size} --seconds {seconds} --contenders native,native_sha256,native_nodurable,"
    "native_nodurable_sha256,native_portable_sha256,raw_direct",
    "gil": f"--case llama --size {{twice}} --seconds {{seconds}} --heartbeat --no-touch --contenders {','.join(OURS)}",
}


class Check(NamedTuple):
    what: str
    value: float
    wanted: str
    met: bool
    raw: float | None = None
    """What the raw limit itself has, where the question is how much faster than another saver."""


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    document = program.document(options, mode="fresh")
    document["runs"] = []
    for part in options.parts:
        for run_of_part in measured(part, options):
            document["runs"].append({"part": part, **run_of_part})
            document["checks"] = [check._asdict() for check in checks(document["runs"])]
            program.write(document, options)  # after each point: a later one may be cut short
    print()
    found = checks(document["runs"])
    for check in found:
        raw = "" if check.raw is None else f" (the raw limit: {check.raw:.3g})"
        print(f"  {'' if check.met else 'MISSED: '}{check.what}: {check.value:.3g}, wanted {check.wanted}{raw}")
    missed = not all(check.met for check in found)
    return 1 if run.verdict(document) or (missed and not options.smoke) else 0


def measured(part: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sizes = {"size": options.size, "twice": 2 * options.size, "large": options.large, "seconds": options.seconds}
    command = PARTS[part].format(**sizes).split()
    parent = TMPFS if part == "tmpfs" else options.dir
    command += ["--rounds", str(options.rounds), "--dir", str(parent)]
    if options.before is not None:
        command += ["--before", str(options.before)]
    with program.scratch(parent) as directory:
        yield from run.measured(run.parse(command), directory)


def checks(runs: list[dict[str, Any]]) -> list[Check]:
    """Of what was measured."""
    found: list[Check] = []

    def ratio(of_run: dict[str, Any], over: str, under: str, metric: str, least: float) -> None:
        theirs, ours = (results.seconds(of_run, key, metric) for key in (over, under))
        if theirs is None or ours is None:
            return
        what = f"{of_run['part']} {format_size(of_run['payload_bytes'])}, {metric[:-2]}: {over} / {under}"
        limit = results.raw_limit(of_run, metric) if over.startswith(("torch", "safetensors")) else None
        raw = theirs / limit if limit else None
        found.append(Check(what, theirs / ours, f">= {least:g}", theirs / ours >= least, raw))

    def most(of_run: dict[str, Any], key: str, name: str, value: float | None, limit: float) -> None:
        if value is not None:
            what = f"{of_run['part']} {format_size(of_run['payload_bytes'])}, {key}: {name}"
            found.append(Check(what, value, f"<= {limit:g}", value <= limit))

    for of_run in runs:
        if of_run["skipped"]:
            continue
        part = of_run["part"]
        for key in OURS:  # with --before
            for metric in results.METRICS:
                ratio(of_run, BEFORE + key, key, metric, 0.97)
        if part in ("llama", "adamw"):
            ratio(of_run, "raw_direct", "native", "durable_s", 0.95)
            ratio(of_run, "torch", "native", "durable_s", 2.7)
            ratio(of_run, "torch", "native", "return_s", 1.7)
            best = min(("raw_buffered", "raw_direct"), key=lambda key: results.seconds(of_run, key, "return_s") or 1e9)
            ratio(of_run, best, "native_nodurable", "return_s", 0.95)
        if part in ("llama", "adamw", "sweep", "large", "large durable"):
            ratio(of_run, "torch_nocrc", "native_nodurable", "return_s", 0.95)
            ratio(of_run, "torch_atomic", "native", "durable_s", 0.95)
        if part == "many":
            for key in OURS:
                ratio(of_run, "torch", key, "return_s", 5)
        if part == "safetensors":
            ratio(of_run, "raw_direct", "native_safetensors", "durable_s", 0.95)
            ratio(of_run, "safetensors_fsync", "native_safetensors", "durable_s", 2)
            ratio(of_run, "safetensors", "native_safetensors_nodurable", "return_s", 1)
        if part == "tmpfs":
            for key in OURS:
                ratio(of_run, "raw_buffered", key, "return_s", 0.9)
        for row in results.rows(of_run):
            key = row["key"]
            if key not in OURS:
                continue
            extra = row["peak_over_ready_bytes"]
            most(of_run, key, "extra memory, MiB", None if extra is None else extra / MIB, 160)
            if part != "tmpfs" and of_run["payload_bytes"] >= GIB // 2:  # below, a save is all start and end
                most(of_run, key, "CPU seconds per GB", row["cpu_s_per_gb"], 0.3)
            if row["largest_gap_s"]:
                most(of_run, key, "largest gap of another thread, ms", 1e3 * row["largest_gap_s"], 50)
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = program.Program("saving", __doc__, rounds=25, seconds=150)
    parser.add_before()
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--large", type=parse_size, default=4 * GIB, help="payload of the part `large`")
    return parser.options(arguments, size=256 * KIB, large=4 * MIB)


if __name__ == "__main__":
    sys.exit(main())
