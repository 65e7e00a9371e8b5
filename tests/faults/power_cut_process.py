"""Ends savers at each of their calls, and copies what their disk holds at that moment; run under preload.c.

    power_cut_process.py MOUNT IMAGE COPIES {native,torch,legacy}

MOUNT is a file system that lies in the file IMAGE. Prints, as JSON, a list of [name of the copy in COPIES, generations
that it may hold].
"""

import json
import os
import pathlib
import subprocess
import sys

import torch

from faults.crash_process import SMALL, Checkpoints, enumerated_kills
from faults.killed_children import forked
from faults.preload import Preload
from faults.temporary_files import age_temporaries


def copy_image(image, copies, found):
    name = f"{len(found)}.img"
    subprocess.run(["cp", "--sparse=always", image, copies / name], check=True)
    return name


def main(mount, image, copies, way):
    torch.set_num_threads(1)  # OpenMP's threads do not survive fork(), and torch waits for them
    preload, checkpoints, copies = Preload(), Checkpoints(mount, way), pathlib.Path(copies)
    checkpoints.save(0, SMALL)
    kills = [*enumerated_kills(preload, checkpoints)]
    checkpoints.save(0, SMALL)
    found, generation = [], 0
    for at, when in kills:

        def save_and_die(later=generation + 1, at=at, when=when):
            with preload.watching(kill_at=at, kill_when=when):
                checkpoints.save(later, SMALL)

        _, status = os.waitpid(forked(save_and_die), 0)
        assert os.WIFSIGNALED(status), f"the save was not killed at {at}"
        found.append((copy_image(image, copies, found), [generation, generation + 1]))
        generation += 2
        age_temporaries(mount)  # or each save would look at one more of them, and be cut off earlier
        checkpoints.save(generation, SMALL)  # returned: from here on nothing older may come back
    found.append((copy_image(image, copies, found), [generation]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
