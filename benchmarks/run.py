"""Runs contenders side by side, one process each, round by round: `python -m benchmarks.run --help`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import environment, program, results
from .cases import KINDS, MIB, format_size, points
from .contenders import ALL, Contender
from .processes import BEFORE, WorkerProcess
from .turns import rounds

NAME = "checkpoint.pt"
SMOKE_NESTED = ("torch", "safetensors", "native", "fallback")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    document = program.document(
        options,
        op=options.op,
        mode="overwrite" if options.overwrite else "fresh",
        **{"free memory touched before each save": not options.no_touch},
    )
    document["runs"] = []
    with program.scratch(options.dir) as directory:
        for run in measured(options, directory):
            document["runs"].append(run)
            program.write(document, options)  # after each point: a later one may be cut short
    return verdict(document)


def measured(options: argparse.Namespace, directory: Path) -> Iterator[dict[str, Any]]:
    """Each point's run, when it has been printed."""
    workers: dict[str, WorkerProcess] = {}
    try:
        for case, nbytes in points(options.case, options.size):
            if not options.smoke:  # a fresh process has a first save; the smoke run has no use for it
                close_all(workers)
                workers = {}
            for op in ("save", "load") if options.op == "both" else (options.op,):
                if not workers or options.op == "both":  # available() depends on the operation
                    close_all(workers)
                    workers = start_all(options, op)
                run = run_point(options, of_case(options, workers, case), directory, case, nbytes, op)
                if not run["skipped"]:
                    results.print_table(run)
                yield run
    finally:
        close_all(workers)


def verdict(document: dict[str, Any]) -> int:
    """0 when every point ran and no contender broke. Skipped contenders are no failure; skipped points are."""
    status = 0
    for run in document["runs"]:
        if run.get("skipped"):
            print(f"NOT RUN: {run['case']} {format_size(run['size_bytes'])}: {run['skipped']}", file=sys.stderr)
            status = 1
        for key, entry in run["contenders"].items():
            if entry["status"] == "failed":
                print(f"FAILED: {key} on {run['case']} ({run['op']}): {entry['reason']}", file=sys.stderr)
                status = 1
    return status


def start_all(options: argparse.Namespace, op: str) -> dict[str, WorkerProcess]:
    keys = list(options.contenders)
    if options.before is not None:
        keys += [BEFORE + key for key in keys if ALL[key].kind == "ours"]
    workers = {
        key: WorkerProcess(
            "saver",
            key,
            before=options.before,
            timeout_s=options.timeout,
            verbose=options.verbose,
            device=options.device,
            op=op,
        )
        for key in keys
    }
    for worker in workers.values():
        worker.wait_started()
    return workers


def kind_of(key: str) -> type[Contender]:
    return ALL[key.removeprefix(BEFORE)]


def of_case(options: argparse.Namespace, workers: dict[str, WorkerProcess], case: str) -> dict[str, WorkerProcess]:
    """All, but for the smoke run's second case: an optimizer's imports cost each process more than all its saves."""
    if options.smoke and case == "adamw":
        return {key: worker for key, worker in workers.items() if key in SMOKE_NESTED}
    return workers


def close_all(workers: dict[str, WorkerProcess]) -> None:
    for worker in workers.values():
        worker.close()


def run_point(
    options: argparse.Namespace, workers: dict[str, WorkerProcess], directory: Path, case: str, nbytes: int, op: str
) -> dict[str, Any]:
    run: dict[str, Any] = {"case": case, "about": KINDS[case].about, "size_bytes": nbytes, "op": op, "contenders": {}}
    run["skipped"] = too_large(options, workers, directory, case, nbytes)
    if run["skipped"]:
        return run
    payload = build_cases(workers, case, nbytes)
    samples: dict[str, list[dict[str, Any]]] = {key: [] for key in workers}
    paths = {key: directory / key / NAME for key in workers}
    for path in paths.values():
        path.parent.mkdir(exist_ok=True)
    for number, order, last in rounds(list(workers), options.rounds, options.seconds):
        for key in order:
            one_round(options, workers[key], paths[key], op, samples[key], last)
            progress(f"{case} {format_size(nbytes)} {op}: round {number}/{options.rounds} {key}")
    progress("")
    run["payload_bytes"], run["tensors"] = payload
    for key, worker in workers.items():
        run["contenders"][key] = results.entry(kind_of(key), worker, samples[key])
    return run


def one_round(
    options: argparse.Namespace, worker: WorkerProcess, path: Path, op: str, samples: list[dict[str, Any]], last: bool
) -> None:
    where = {"path": str(path)}
    if op == "save":
        how = {"overwrite": options.overwrite, "touch": not options.no_touch, "heartbeat": options.heartbeat}
        sample = worker.order("save", **where, **how)
        if last:
            worker.order("check", **where)
        if last or not options.overwrite:
            worker.order("remove", **where)
    else:
        if not samples and worker.order("save", **where, overwrite=False, touch=False) is None:
            return
        cold = worker.order("load", **where, cold=True)
        warm = worker.order("load", **where, cold=False)
        sample = None if cold is None or warm is None else {"cold": cold, "warm": warm}
        if last:
            worker.order("remove", **where)
    if sample is not None:
        samples.append(sample)


def build_cases(workers: dict[str, WorkerProcess], case: str, nbytes: int) -> tuple[int, int]:
    """Builds the case in every worker; returns payload bytes and tensors. The raw ones are told the others' payload."""
    payload: tuple[int, int] | None = None
    for needs_state in (True, False):
        chosen = [w for w in workers.values() if kind_of(w.name).needs_state is needs_state]
        order = {"case": case, "nbytes": nbytes, "payload_nbytes": None if payload is None else payload[0]}
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            pending = [pool.submit(worker.order, "build", **order) for worker in chosen]
        built = [future.result() for future in pending]
        for answer in built:
            if answer is not None and needs_state:
                payload = (answer["payload_bytes"], answer["tensors"])
    return payload or (nbytes, 0)


def too_large(
    options: argparse.Namespace, workers: dict[str, WorkerProcess], directory: Path, case: str, nbytes: int
) -> str | None:
    """Swapping or a full disk would spoil the figures, so such a point is not run."""
    holding = sum(kind_of(key).needs_state and worker.status == "ok" for key, worker in workers.items())
    memory = environment.memory_nbytes("MemAvailable")
    needed = 2 * nbytes  # one file in the page cache, one copy while checking
    if options.device == "cpu":
        needed += int((holding + KINDS[case].build_factor - 1) * nbytes)
    if memory is not None and needed > 0.9 * memory:
        return (
            f"{holding} contenders need {format_size(needed)} of memory, {format_size(memory)} is there: "
            "name fewer --contenders or a smaller --size"
        )
    files = holding if options.overwrite or options.op != "save" else 2
    free = shutil.disk_usage(directory).free
    if files * nbytes * 1.1 > free:
        return f"{format_size(files * nbytes)} of files, {format_size(free)} free in {directory}"
    return None


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = program.Program("run", __doc__, rounds=5)
    parser.add_device()
    parser.add_before()
    parser.add_argument(
        "--case",
        type=program.comma_list([*KINDS, "sweep"]),
        default=["llama"],
        help="of: %(metavar)s",
        metavar=",".join([*KINDS, "sweep"]),
    )
    parser.add_argument(
        "--contenders",
        type=program.comma_list(list(ALL)),
        default=list(ALL),
        metavar="a,b,c",
        help=f"of: {','.join(ALL)}",
    )
    parser.add_argument("--op", choices=["save", "load", "both"], default="save")
    parser.add_argument("--overwrite", action="store_true", help="save over the last file; default: remove it first")
    parser.add_argument("--heartbeat", action="store_true", help="beside each save a Python thread ticks every ms")
    parser.add_argument("--no-touch", action="store_true", help="don't touch free memory before each save")
    parser.add_argument("--timeout", type=float, default=600, help="seconds any one order to a worker may take")
    parser.add_argument("--verbose", action="store_true", help="let the workers' stderr through")
    return parser.options(arguments, case=["llama", "adamw"], size=MIB)


if __name__ == "__main__":
    sys.exit(main())
