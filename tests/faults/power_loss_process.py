"""Records saves with the data that they write; run under preload.c.

    power_loss_process.py DIRECTORY WAY...

A way is one of ways.py, or `stock` for the installed torch.save writing in place. Writes
DIRECTORY/records.pickle: a list of (name, durable, events, target, file before or None, file after), and
DIRECTORY/sums.pickle: the same of durable saves that replace a file with a sum beside it, with a new sum and without,
the files before and after by their paths.
"""

import itertools
import pathlib
import pickle
import sys

import torch

from faults import ways
from faults.preload import Preload

SMALL, LARGE = 3000, 9 << 20


def save(way, obj, path, durable):
    if way == "stock":
        torch.save(obj, path, _use_new_zipfile_serialization=False)
    else:
        ways.save_in(way, obj, path, durable=durable)


def main(directory, *chosen):
    preload, records = Preload(), []
    cases = itertools.product(chosen, (SMALL, LARGE), (True, False), (True, False))
    for number, (way, nbytes, durable, overwrite) in enumerate(cases):
        if way in ("legacy", "stock") and nbytes == LARGE:
            continue
        place = pathlib.Path(directory, str(number))
        place.mkdir()
        path = place / "model.pt"
        old = {"weight": torch.ones(nbytes + 100, dtype=torch.uint8)}
        new = {"weight": torch.arange(nbytes, dtype=torch.int64).to(torch.uint8)}
        before = None
        if overwrite:
            save(way, old, path, durable)
            before = path.read_bytes()
        with preload.watching(record=2):
            save(way, new, str(path), durable)
        name = f"{way} {'small' if nbytes == SMALL else 'large'} {'overwrite' if overwrite else 'fresh'}"
        records.append((name, durable, preload.events(), str(path), before, path.read_bytes()))
    pathlib.Path(directory, "records.pickle").write_bytes(pickle.dumps(records))
    sums = [with_sum(preload, directory, way, new) for way in chosen if way != "stock" for new in ("sha256", None)]
    pathlib.Path(directory, "sums.pickle").write_bytes(pickle.dumps(sums))


def with_sum(preload, directory, way, new):
    """``new``: digest of the save that is recorded; the file that it replaces has one."""
    place = pathlib.Path(directory, f"{way}-with-sum-{new}")
    place.mkdir()
    path = place / "model.pt"
    ways.save_in(way, {"weight": torch.ones(SMALL)}, str(path), digest="sha256")
    before = {str(file): file.read_bytes() for file in place.iterdir()}
    with preload.watching(record=2):
        ways.save_in(way, {"weight": torch.zeros(SMALL)}, str(path), digest=new)
    after = {str(file): file.read_bytes() for file in place.iterdir()}
    return way, preload.events(), str(path), before, after


if __name__ == "__main__":
    main(*sys.argv[1:])
