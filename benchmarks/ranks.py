"""Many ranks into one file, against what people do today: `python -m benchmarks.ranks --ranks 2`.

Contenders, interleaved in the same processes, each timed from a barrier until the last rank is done and the file is
on the device: `dcp.save` through `SingleFileWriter`; one rank's `statedict_io.save` of a state that it holds;
gathering to rank 0 and `torch.save`, and fsync; `dcp.save` with the stock writer, `dcp_to_torch_save`, and fsync.
Then loads of the files, cold and warm.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from . import program, results
from .cases import MIB
from .processes import BEFORE, WorkerProcess
from .turns import rounds

OURS = ("one_file", "one_rank")
SAVES = (*OURS, "gather", "stock")
#: Direct writes leave nothing in the page cache: the first load of our file is cold.
LOADS = {
    "load_one_file_cold": "load_one_file",
    "load_one_file_warm": "load_one_file",
    "load_stock_warm": "load_stock",
}


class Job:
    """All ranks; `before` is BEFORE for those of another checkout."""

    def __init__(self, before: str, options: argparse.Namespace, directory: Path) -> None:
        directory.mkdir()
        how: dict[str, Any] = {"ranks": options.ranks, "size": options.size, "directory": str(directory)}
        self.ranks = [
            WorkerProcess("rank", f"{before}{rank}", before=options.before, **how) for rank in range(options.ranks)
        ]
        for rank in self.ranks:
            rank.wait_started()

    def seconds(self, contender: str) -> float:
        for rank in self.ranks:
            rank.send("run", contender=contender)
        answers = [rank.answer() for rank in self.ranks]
        failed = [rank.reason for rank in self.ranks if rank.status != "ok"]
        if failed:
            raise SystemExit(f"{contender}: {failed}")
        return max(answer["s"] for answer in answers if answer is not None)

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


def main(arguments: list[str] | None = None) -> int:
    parser = program.Program("ranks", __doc__, rounds=5)
    parser.add_before()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=OURS, help="these contenders, and no loads: to compare --before")
    options = parser.options(arguments, size=4 * MIB)
    document = program.document(options, ranks=options.ranks)
    saves = list(options.only or SAVES)
    loads = {} if options.only else LOADS
    if options.before is not None:
        saves += [BEFORE + name for name in saves if name in OURS]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in [*saves, *loads]}
    jobs: dict[str, Job] = {}
    with program.scratch(options.dir) as directory:
        try:
            for before in dict.fromkeys(BEFORE * name.startswith(BEFORE) for name in saves):
                jobs[before] = Job(before, options, directory / (before or "this"))
            for _, order, _ in rounds(saves, options.rounds, options.seconds):
                for job in jobs.values():
                    job.ranks[0].order("empty")
                for name in [*order, *loads]:
                    job = jobs[BEFORE * name.startswith(BEFORE)]
                    samples[name].append({"s": job.seconds(LOADS.get(name, name.removeprefix(BEFORE)))})
        finally:
            for job in jobs.values():
                job.close()
    found = {name: results.measured(of) for name, of in samples.items()}
    for name, entry in found.items():
        median = entry["median"]["s"]
        base = found["load_one_file_warm" if name in LOADS else saves[0]]["median"]["s"]
        print(f"{name:18} {median:7.3f} s  {options.size / median / 1e9:6.2f} GB/s  {median / base:5.2f}x")
    document["ranks"] = {"payload_bytes": options.size, "contenders": found}
    program.write(document, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
