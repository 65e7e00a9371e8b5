"""Saves to files that ask odd things of direct I/O; run under preload.c: alignment_process.py DIRECTORY.

Prints, for each alignment that statx is made to report, whether direct I/O was asked for.
"""

import json
import pathlib
import sys

import torch

import statedict_io as sio
from faults.preload import Preload

F_SETFL, O_DIRECT = 4, 0o40000
ALIGNMENTS = (0, 1, 3, 512, 4096, 4097, 8192, 65536, 1 << 20, 1 << 21, 1 << 30)


def main(directory):
    preload, path = Preload(), pathlib.Path(directory, "model.pt")
    asked = {}
    for nbytes in ((9 << 20) + 13, 16 << 20, (8 << 20) + 1):
        obj = {"weight": torch.arange(nbytes, dtype=torch.int32).to(torch.uint8)}
        sio.save(obj, path, backend="native", durable=False)
        expected = path.read_bytes()
        for alignment in ALIGNMENTS:
            path.unlink()
            with preload.watching(record=1, alignment=alignment):
                sio.save(obj, path, backend="native")
            assert path.read_bytes() == expected, (nbytes, alignment)
            asked[alignment] = any(
                e.call == "fcntl" and e.offset == F_SETFL and e.nbytes & O_DIRECT for e in preload.events()
            )
    print(json.dumps(asked))


if __name__ == "__main__":
    main(*sys.argv[1:])
