"""Kills savers and looks at what is left, with a reader looking on all the time; run under preload.c.

    crash_process.py DIRECTORY {native,torch,legacy,stock,safetensors}[-async] NUM_RANDOM SEED

Savers are forked from a process that has saved before. Some are killed before, in the middle of and after each call of
a save, the others at random moments. Prints counts, as JSON.
"""

import io
import itertools
import json
import os
import pathlib
import random
import signal
import sys
import time
import zipfile

import torch

import statedict_io as sio
from faults import ways
from faults.killed_children import Onlooker, forked, wait_until_killed
from faults.preload import AFTER, BEFORE, HALFWAY, Preload
from faults.temporary_files import age_temporaries

SMALL, LARGE = 100_000, 9 << 20


class Checkpoints:
    def __init__(self, directory, way):
        self.path = pathlib.Path(directory, "model.pt")
        self.way, _, self.is_async = way.partition("-")

    def save(self, generation, nbytes):
        weight = torch.full((nbytes,), generation % 251, dtype=torch.uint8)
        state = {"generation": torch.tensor(generation), "weight": weight}
        if not self.is_async:
            ways.save_in(self.way, state, self.path)
            return
        with ways.options_for(self.way) as options:
            sio.save_async(state, self.path, **options).result()

    def generation(self):
        """Of the file at the path, all of which is looked at."""
        content = self.path.read_bytes()
        if content[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                assert archive.testzip() is None
        loaded = ways.loaded(self.way, content)
        assert bool((loaded["weight"] == loaded["generation"] % 251).all())
        return loaded["generation"].item()

    def generations(self):
        while True:
            yield self.generation()

    def leftovers(self):
        return [path for path in self.path.parent.iterdir() if path != self.path]

    def age_leftovers(self):
        age_temporaries(self.path.parent)


def enumerated_kills(preload, checkpoints):
    with preload.watching(record=1, no_sync=True) as control:
        checkpoints.save(0, SMALL)
        total = control.total
    writes = [i for i, event in enumerate(preload.events(), 1) if "write" in event.call]
    yield from itertools.product(range(1, total + 1), (BEFORE, AFTER))
    yield from itertools.product(writes, [HALFWAY])


def save_until_killed(checkpoints, generation, nbytes):
    for later in itertools.count(generation):
        checkpoints.save(later, nbytes)


def save_and_die(preload, checkpoints, generation, at, when):
    with preload.watching(no_sync=True, kill_at=at, kill_when=when):
        checkpoints.save(generation, SMALL)


def kill_all(kills, checkpoints, preload, chance, counts):
    generation = 0
    for kill in kills:
        first = generation + 1
        if kill is None:
            nbytes = chance.choice([SMALL, LARGE])
            child = forked(lambda first=first, nbytes=nbytes: save_until_killed(checkpoints, first, nbytes))
            time.sleep(chance.uniform(0.001, 0.08))
            os.kill(child, signal.SIGKILL)
        else:
            child = forked(lambda first=first, kill=kill: save_and_die(preload, checkpoints, first, *kill))
            counts["at_calls"] += 1
        wait_until_killed(child, kill)
        counts["kills"] += 1
        found = checkpoints.generation()
        assert found == generation or (found >= first if kill is None else found == first), f"{kill}: {found}"
        counts["new_file"] += found != generation
        counts["leftovers"] += bool(checkpoints.leftovers())
        checkpoints.age_leftovers()
        generation = found + 1
        checkpoints.save(generation, SMALL)
        assert checkpoints.generation() == generation
        assert not checkpoints.leftovers(), f"{kill}: left {checkpoints.leftovers()}"


def main(directory, way, num_random, seed):
    torch.set_num_threads(1)  # OpenMP's threads do not survive fork(), and torch waits for them
    chance, preload = random.Random(int(seed)), Preload()
    checkpoints = Checkpoints(directory, way)
    checkpoints.save(0, LARGE)
    kills = [*enumerated_kills(preload, checkpoints), *[None] * int(num_random)]
    counts = {"way": way, "kills": 0, "at_calls": 0, "new_file": 0, "leftovers": 0}
    with Onlooker(checkpoints.generations()) as onlooker:
        kill_all(kills, checkpoints, preload, chance, counts)
    print(json.dumps({**counts, "reads": onlooker.num_looks}))


if __name__ == "__main__":
    main(*sys.argv[1:])
