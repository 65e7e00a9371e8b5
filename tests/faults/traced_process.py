"""Saves between two marks, for strace to look at; run under preload.c.

    traced_process.py DIRECTORY {native,torch,legacy}

Prints the calls that the library saw, as JSON.
"""

import collections
import itertools
import json
import os
import sys

import torch

import statedict_io as sio
from faults.preload import Preload
from faults.ways import OPTIONS


def main(directory, way):
    path = os.path.join(directory, "model.pt")
    options = OPTIONS[way]
    preload, seen = Preload(), collections.Counter()
    objects = [torch.zeros(nbytes, dtype=torch.uint8) for nbytes in (1000, 12 << 20)]
    sio.save(objects[0], path, **options)
    for obj, durable, fresh in itertools.product(objects, (True, False), (True, False)):
        if fresh:
            os.unlink(path)
        os.access("/sdio-begin", os.F_OK)
        with preload.watching(record=1):
            sio.save(obj, path, durable=durable, **options)
        os.access("/sdio-end", os.F_OK)
        seen.update(event.call for event in preload.events())
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
