"""Records saves with the data that they write; run under preload.c.

    power_loss_process.py DIRECTORY WAY...

A way is native, torch or legacy, or `stock` for the installed torch.save writing in place. Writes
DIRECTORY/records.pickle: a list of (name, durable, events, target, file before or None, file after).
"""

import itertools
import pathlib
import pickle
import sys

import torch

import statedict_io as sio
from faults.preload import Preload

SMALL, LARGE = 3000, 9 << 20


def save(way, obj, path, durable):
    if way == "stock":
        torch.save(obj, path, _use_new_zipfile_serialization=False)
    else:
        options = {"_use_new_zipfile_serialization": False} if way == "legacy" else {"backend": way}
        sio.save(obj, path, durable=durable, **options)


def main(directory, *ways):
    preload, records = Preload(), []
    cases = itertools.product(ways, (SMALL, LARGE), (True, False), (True, False))
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


if __name__ == "__main__":
    main(*sys.argv[1:])
