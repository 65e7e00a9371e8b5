"""Kills loops that save, prune and resume, and looks at what is left; run under preload.c.

    checkpoints.kills_process DIRECTORY {native,torch}[-async] NUM_RANDOM SEED

Loops are forked. Some are killed before and after each call of a save, the others at random moments, while a reader
looks on all the time. Prints counts, as JSON.
"""

import json
import os
import pathlib
import random
import signal
import sys
import time
import warnings

import torch
from faults.killed_children import Onlooker, forked, wait_until_killed
from faults.preload import AFTER, BEFORE, Preload

import statedict_io as sio

KEEP_LAST, KEEP_BEST = 1, 1  # each save displaces what the link `latest` leads to
SMALL, LARGE = 1000, 3 << 20
FILES_KEPT = KEEP_LAST + KEEP_BEST


def metric_of(step):
    return (step * 7919 % 1000) / 1000


def state_of(step, nbytes):
    return {"step": step, "weight": torch.full((nbytes,), step % 251, dtype=torch.uint8)}


class Loop:
    def __init__(self, directory, way):
        self.path = pathlib.Path(directory, "run")
        self.backend, _, self.is_async = way.partition("-")

    def opened(self):
        return sio.CheckpointDirectory(self.path, keep_last=KEEP_LAST, keep_best=KEEP_BEST, best="min", links=True)

    def newest(self):
        """The step of the newest checkpoint, which has to be sound, with its facts and its links."""
        found = self.opened().latest()
        if found is None:
            return 0
        assert found.skipped == [], found.skipped
        loaded = found.load()
        assert loaded["step"] == found.step and bool((loaded["weight"] == found.step % 251).all())
        assert found.metric == metric_of(found.step), (found, found.metric)
        return found.step

    def newest_steps(self):
        """For one who looks on: what is the newest is sound."""
        ckpts = self.opened()
        while True:
            found = ckpts.latest()
            assert found is not None
            assert ckpts.restore() >= found.step
            yield found.step

    def files(self):
        return sorted(path.name for path in self.path.glob("*.pt"))

    def check_order(self, read):
        """After a save: nothing but what is kept, and `read` more that somebody may be reading."""
        expected = {"latest", "best"}
        kept = list(self.opened())
        assert len(kept) <= FILES_KEPT + read, kept
        for each in kept:
            assert each.metric == metric_of(each.step), f"the metric of step {each.step} is lost"
            expected |= {os.path.basename(each.path), os.path.basename(each.path) + ".json"}
        assert set(os.listdir(self.path)) == expected, f"left over: {set(os.listdir(self.path)) ^ expected}"

    def check_links(self):
        for link in ("latest", "best"):
            path = self.path / link
            assert not path.is_symlink() or path.exists(), f"{link} leads nowhere, to {os.readlink(path)}"

    def run(self, nbytes, report):
        """Saves one step after the other, and tells of each that it begins, and that it is there."""
        ckpts = self.opened()
        step = self.newest()
        in_flight = []
        while True:
            step += 1
            os.write(report, f"B{step}\n".encode())
            if self.is_async:
                in_flight.append((step, ckpts.save_async(
                    state_of(step, nbytes), step, metric_of(step), backend=self.backend)))  # fmt: skip
                if len(in_flight) > 1:
                    ended, saved = in_flight.pop(0)
                    saved.result()
                    os.write(report, f"C{ended}\n".encode())
            else:
                ckpts.save(state_of(step, nbytes), step, metric_of(step), backend=self.backend)
                os.write(report, f"C{step}\n".encode())

    def save_once(self, step):
        with self.opened() as ckpts:
            if self.is_async:
                # The limit is given: looking for the machine's memory takes many calls.
                limits = {"max_snapshot_nbytes": 1 << 30}
                ckpts.save_async(state_of(step, SMALL), step, metric_of(step), backend=self.backend, **limits).result()
            else:
                ckpts.save(state_of(step, SMALL), step, metric_of(step), backend=self.backend)


def num_calls(preload, loop, step):
    with preload.watching(no_sync=True) as control:
        loop.save_once(step)
        return control.total


def save_and_die(preload, loop, step, at, when):
    with preload.watching(no_sync=True, kill_at=at, kill_when=when):
        loop.save_once(step)


def kill_all(kills, step, loop, preload, chance, counts, read=0):
    """The step of the last checkpoint."""
    for kill in kills:
        begun_end, report = os.pipe()
        if kill is None:
            nbytes = chance.choice([SMALL, SMALL, LARGE])
            child = forked(lambda nbytes=nbytes, report=report: loop.run(nbytes, report))
            time.sleep(chance.uniform(0.005, 0.12))
            os.kill(child, signal.SIGKILL)
        else:
            child = forked(lambda kill=kill, step=step: save_and_die(preload, loop, step + 1, *kill))
            counts["at_calls"] += 1
        wait_until_killed(child, kill)
        os.close(report)
        told = b""
        while data := os.read(begun_end, 1 << 16):
            told += data
        os.close(begun_end)
        begun = [int(line[1:]) for line in told.split() if line.startswith(b"B")] + [step + (kill is not None)]
        committed = [int(line[1:]) for line in told.split() if line.startswith(b"C")] + [step]
        counts["kills"] += 1
        found = loop.newest()
        assert max(committed) <= found <= max(begun), f"{kill}: {found}, of {max(committed)} to {max(begun)}"
        loop.check_links()
        counts["new"] += found != step
        counts["most_files"] = max(counts["most_files"], len(loop.files()))
        assert len(loop.files()) <= FILES_KEPT + (2 if loop.is_async else 1) + read, f"{kill}: {loop.files()}"
        counts["leftovers"] += any(name.startswith(".") for name in os.listdir(loop.path))
        step = found + 1
        with preload.watching(no_sync=True):  # what is asked here is no question of the disk's
            loop.save_once(step)
        assert loop.newest() == step
        loop.check_order(read)
    return step


def main(directory, way, num_random, seed):
    torch.set_num_threads(1)  # OpenMP's threads do not survive fork(), and torch waits for them
    warnings.simplefilter("error")
    chance, preload, loop = random.Random(int(seed)), Preload(), Loop(directory, way)
    for step in range(1, FILES_KEPT + 2):
        loop.save_once(step)
    step += 1
    calls = num_calls(preload, loop, step)
    counts = {"way": way, "kills": 0, "at_calls": 0, "new": 0, "leftovers": 0, "most_files": 0}
    at_calls = [(1, BEFORE)] + [(at, AFTER) for at in range(1, calls + 1)]
    step = kill_all(at_calls, step, loop, preload, chance, counts)
    with Onlooker(loop.newest_steps()) as onlooker:
        kill_all([None] * int(num_random), step, loop, preload, chance, counts, read=1)
    print(json.dumps({**counts, "reads": onlooker.num_looks}))


if __name__ == "__main__":
    main(*sys.argv[1:])
