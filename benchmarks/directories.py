"""What a ``CheckpointDirectory`` costs beside plain saves: time a checkpoint, and time of ``latest()`` in a large one.

    python -m benchmarks.directories --out results.json

Saves take turns: one into the directory, one under the same names in a plain one, whose oldest file is deleted
alike. ``latest()`` is timed without its verification, which is a read of the file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import statedict_io as sio

from .environment import describe

KEPT = 3
MAX_EXTRA_MS, MAX_LATEST_MS = 1.0, 50.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default=".", help="measures that file system")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--files", type=int, default=1000, help="in the directory of latest()")
    parser.add_argument("--out", help="results, as JSON")
    parser.add_argument("--smoke", action="store_true", help="does it run?")
    options = parser.parse_args()
    rounds, files = (4, 20) if options.smoke else (options.rounds, options.files)
    document: dict[str, Any] = {"environment": describe(pathlib.Path(options.dir), "cpu"), "saves": [], "latest": None}
    with temporary(options.dir) as directory:
        for nbytes in (64 << 10, 4 << 20):
            for durable in (True, False):
                document["saves"].append(saves(directory, nbytes, durable, rounds))
        document["latest"] = latest(directory, files, max(rounds // 4, 3))
    for each in document["saves"]:
        extra = statistics.median(b - a for a, b in zip(each["plain_s"], each["directory_s"], strict=True)) * 1e3
        name = f"{each['nbytes'] >> 10} KiB, {'durable' if each['durable'] else 'not durable'}"
        plain, ours = (statistics.median(each[key]) * 1e3 for key in ("plain_s", "directory_s"))
        print(f"{name}: plain {plain:.2f} ms, directory {ours:.2f} ms; {extra:.2f} ms more (asked: {MAX_EXTRA_MS})")
    median = statistics.median(document["latest"]["seconds"]) * 1e3
    print(f"latest() of {files} checkpoints: {median:.2f} ms (asked: {MAX_LATEST_MS})")
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(document, indent=1) + "\n")


@contextlib.contextmanager
def temporary(above: str) -> Iterator[pathlib.Path]:
    path = pathlib.Path(tempfile.mkdtemp(prefix="sdio-directories-", dir=above))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def saves(directory: pathlib.Path, nbytes: int, durable: bool, rounds: int) -> dict[str, Any]:
    state = {f"weight{i}": torch.rand(nbytes // 16 // 4) for i in range(16)}
    plain, ours = directory / f"plain-{nbytes}-{durable}", directory / f"directory-{nbytes}-{durable}"
    plain.mkdir()
    ckpts = sio.CheckpointDirectory(ours, keep_last=KEPT)

    def save_plain(step: int) -> None:
        sio.save(state, plain / f"step-{step:08d}.pt", durable=durable)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(plain / f"step-{step - KEPT:08d}.pt")

    def save_ours(step: int) -> None:
        ckpts.save(state, step, 0.5, durable=durable)

    times: dict[Callable[[int], None], list[float]] = {save_plain: [], save_ours: []}
    for step in range(rounds + KEPT + 1):
        for save in (save_plain, save_ours) if step % 2 else (save_ours, save_plain):
            begin = time.perf_counter()
            save(step)
            times[save].append(time.perf_counter() - begin)
    ckpts.close()
    plain_s, ours_s = (times[save][KEPT + 1 :] for save in (save_plain, save_ours))
    return {"nbytes": nbytes, "durable": durable, "plain_s": plain_s, "directory_s": ours_s}


def latest(directory: pathlib.Path, files: int, rounds: int) -> dict[str, Any]:
    path = directory / "many"
    with sio.CheckpointDirectory(path) as ckpts:
        for step in range(files):
            ckpts.save({"step": step}, step, float(step), durable=False)
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        found = sio.CheckpointDirectory(path, keep_last=3).latest(verify=False)
        seconds.append(time.perf_counter() - begin)
        assert found is not None and found.step == files - 1
    return {"files": files, "seconds": seconds}


if __name__ == "__main__":
    main()
