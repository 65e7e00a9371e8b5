"""What a ``CheckpointDirectory`` costs: `python -m benchmarks.directories --out results.json`.

It takes turns with plain saves and deletions of the oldest file, by hand; then `latest()` of a large directory, without
its verification, which is a read of the file, takes turns with a listing. Each contender has a process of its own. Ends
with what is asked, and exits with 1 where a figure misses that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import program, results
from .cases import KIB, MIB, format_size
from .processes import WorkerProcess
from .turns import rounds

OURS, BY_HAND = "statedict_io.CheckpointDirectory", "by hand"
SIZES = (64 * KIB, 4 * MIB)
MOST_EXTRA_MS, MOST_LATEST_MS = 1, 50


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    document = program.document(options)
    document["directories"] = parts = []
    workers = {name: WorkerProcess("keeper", name) for name in (BY_HAND, OURS)}
    try:
        for worker in workers.values():
            worker.wait_started()
        with program.scratch(options.dir) as directory:
            for nbytes in SIZES:
                for durable in (True, False):
                    parts.append(saves(workers, options, directory / f"{len(parts)}", nbytes, durable))
                    print_part(parts[-1])
            parts.append(latest(workers, options, directory / "many"))
            print_part(parts[-1])
    finally:
        for worker in workers.values():
            worker.close()
    found = checks(parts)
    document["checks"] = [dict(zip(("what", "is", "wanted", "met"), check, strict=True)) for check in found]
    program.write(document, options)
    print()
    for what, value, wanted, met in found:
        print(f"  {'' if met else 'MISSED: '}{what}: {value:.3g}, wanted {wanted}")
    broken = [each["reason"] for part in parts for each in part["contenders"].values() if each["status"] != "ok"]
    print(*broken, sep="\n", file=sys.stderr)
    missed = any(not met for _, _, _, met in found)
    return 1 if broken or (missed and not options.smoke) else 0


def saves(
    workers: dict[str, WorkerProcess], options: argparse.Namespace, directory: Path, nbytes: int, durable: bool
) -> dict[str, Any]:
    """`extra` is by how much longer ours took than the save by hand of the same round."""
    for name, worker in workers.items():
        worker.order("begin", path=str(directory / name), nbytes=nbytes, durable=durable)
    samples = in_turns(workers, options, lambda worker, number: worker.order("save", number=number))
    pairs = zip(samples[BY_HAND], samples[OURS], strict=False)
    extra = results.measured([{"s": ours["s"] - by_hand["s"]} for by_hand, ours in pairs])
    what = f"a checkpoint of {format_size(nbytes)}{'' if durable else ', durable=False'}"
    return {"what": what, "payload_bytes": nbytes, "durable": durable, "extra": extra, **described(workers, samples)}


def latest(workers: dict[str, WorkerProcess], options: argparse.Namespace, path: Path) -> dict[str, Any]:
    import statedict_io as sio

    with sio.CheckpointDirectory(path) as ckpts:
        for step in range(options.files):
            ckpts.save({"step": step}, step, float(step), durable=False)
    samples = in_turns(workers, options, lambda worker, _: worker.order("find", path=str(path)))
    return {"what": f"latest() of {options.files:,} checkpoints", "files": options.files, **described(workers, samples)}


def in_turns(
    workers: dict[str, WorkerProcess],
    options: argparse.Namespace,
    order: Callable[[WorkerProcess, int], dict[str, Any] | None],
) -> dict[str, list[Any]]:
    samples: dict[str, list[Any]] = {name: [] for name in workers}
    for number, names, _ in rounds(list(workers), options.rounds, options.seconds):
        for name in names:
            sample = order(workers[name], number)
            if sample is not None:
                samples[name].append(sample)
    return samples


def described(workers: dict[str, WorkerProcess], samples: dict[str, list[Any]]) -> dict[str, Any]:
    return {
        "contenders": {
            name: {"status": worker.status, "reason": worker.reason, **results.measured(samples[name])}
            for name, worker in workers.items()
        }
    }


def checks(parts: list[dict[str, Any]]) -> list[tuple[str, float, str, bool]]:
    """(what, figure, what is wanted, met); of what was measured."""
    found = []
    for part in parts:
        is_save = "extra" in part
        median = (part["extra"] if is_save else part["contenders"][OURS])["median"]
        if median:
            value, most = 1e3 * median["s"], MOST_EXTRA_MS if is_save else MOST_LATEST_MS
            what = f"{part['what']}: {'ms more than by hand' if is_save else 'ms'}"
            found.append((what, value, f"<= {most}", value <= most))
    return found


def print_part(part: dict[str, Any]) -> None:
    print(f"{part['what']}: medians")
    rows = dict(part["contenders"])
    if "extra" in part:
        rows["more, of the same round"] = {"status": "ok", **part["extra"]}
    for name, entry in rows.items():
        if not entry["median"]:
            print(f"  {name:34} {entry['status']}: {entry['reason']}")
            continue
        _, low, high, _ = (1e3 * value for value in entry["spread"]["s"])
        print(f"  {name:34} {1e3 * entry['median']['s']:8.2f} ms  {low:.2f} to {high:.2f}  {entry['rounds']} rounds")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = program.Program("directories", __doc__, rounds=200, seconds=45)
    parser.add_argument("--files", type=int, default=1000, help="in the directory of latest()")
    return parser.options(arguments, files=20)


if __name__ == "__main__":
    sys.exit(main())
