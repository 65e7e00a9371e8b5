"""One object from 1, 2, 4 ranks over a slow network: `python -m benchmarks.remote_ranks --ranks 1 2 4`.

Store and network are those of `benchmarks.remote`, in a process of their own, with a limit for each connection: so many
ranks have so many times as many connections. The state is a model that is sharded by rows; each save is timed from a
barrier until the last rank is done. In the end all ranks' objects are compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from . import program, results
from .cases import MIB, parse_size
from .network import BUCKET
from .processes import WorkerProcess


def main(arguments: list[str] | None = None) -> int:
    parser = program.Program("remote_ranks", __doc__, rounds=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--connections", type=int, default=2, help="of a rank")
    parser.add_argument("--layer", type=parse_size, default=64 * MIB, help="bytes of a tensor")
    parser.add_argument("--latency", type=float, default=0.03, help="seconds of a round trip")
    parser.add_argument("--rate", type=float, default=40e6, help="bytes per second of a connection")
    options = parser.options(arguments, size=16 * MIB, ranks=[1, 2], layer=8 * MIB, latency=0.0)
    document = program.document(options, mode="remote_ranks", connections=options.connections, layer=options.layer)
    found, objects = {}, []
    with program.scratch(options.dir) as directory:
        store = WorkerProcess("network", "store")
        store.wait_started()
        try:
            for num_ranks in options.ranks:
                found[str(num_ranks)] = measured(num_ranks, store, directory / str(num_ranks), options)
                objects.append(store.order("describe", key="one.pt"))
        finally:
            store.close()
    alone = found[str(options.ranks[0])]["median"]["s"] * options.ranks[0]
    for name, entry in found.items():
        seconds = entry["median"]["s"]
        print(
            f"{name} ranks {seconds:7.3f} s  {options.size / seconds / 1e6:6.0f} MB/s  {seconds / alone:5.3f}x of one"
        )
    document["remote_ranks"] = {"payload_bytes": options.size, "ranks": found}
    program.write(document, options)
    return 0 if all(each == objects[0] and not each["uploads"] for each in objects) else 1


def measured(num_ranks: int, store: WorkerProcess, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Round 0 has no limits."""
    directory.mkdir()
    how: dict[str, Any] = {
        "ranks": num_ranks,
        "size": options.size,
        "directory": str(directory),
        "layer": options.layer,
        "url": store.about["url"],
        "connections": options.connections,
        "object": f"s3://{BUCKET}/one.pt",
    }
    ranks = [WorkerProcess("rank", str(rank), **how) for rank in range(num_ranks)]
    samples = []
    try:
        for rank in ranks:
            rank.wait_started()
        for number in range(options.rounds + 1):
            store.order("limit", latency=options.latency if number else 0.0, rate=options.rate if number else None)
            for rank in ranks:
                rank.send("run", contender="one_object")
            answers = [answer for rank in ranks if (answer := rank.answer()) is not None]
            failed = [rank.reason for rank in ranks if rank.status != "ok"]
            if failed:
                raise SystemExit(f"{num_ranks} ranks: {failed}")
            samples.append({name: max(answer[name] for answer in answers) for name in answers[0]})
    finally:
        for rank in ranks:
            rank.close()
    return results.measured(samples)


if __name__ == "__main__":
    sys.exit(main())
