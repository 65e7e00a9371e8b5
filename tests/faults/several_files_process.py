"""Kills savers whose saves are of several files, and makes their calls fail, and looks at what readers find; run under
preload.c.

    several_files_process.py DIRECTORY {native,torch} {kills,errors} OLD NEW {sum,no-sum} {quick,exhaustive}

OLD and NEW are the numbers of safetensors files of the set that is there and of that which takes its place; 0: a file
of torch.save. The old ones have a sum beside them, and the new ones too unless it is to be "no-sum". Prints counts, as
JSON.
"""

import errno
import json
import os
import pathlib
import shutil
import sys

import torch
from shard_sets import generation_of_tensors, state_of, whole_set

import statedict_io as sio
from faults.fault_oracle import ERRORS, OTHERS
from faults.killed_children import forked, wait_until_killed
from faults.preload import AFTER, AFTERWARDS, BEFORE, FOREVER, Preload
from faults.temporary_files import age_temporaries

#: After any other call the disk holds what it held before.
CHANGES = {"openat", "pwrite", "pwritev", "write", "ftruncate", "fsync", "renameat", "linkat", "unlinkat", "fchmod"}
#: bytes a shard, by the number of files: of three tensors of 4000
SIZES = {1: 10**6, 2: 8000, 3: 4000}


class Folder:
    def __init__(self, directory, backend, old, new, digest):
        self.path, self.backend, self.old, self.new = pathlib.Path(directory, "set"), backend, old, new
        self.digest = digest
        self.path.mkdir()
        self.save(2, new)  # everything is imported
        self.names = sorted(os.listdir(self.path))
        self.reset()

    def save(self, generation, num_files, **options):
        options = {"digest": self.digest, "backend": self.backend, **options}
        if num_files == 0:
            sio.save(state_of(generation), self.path / "model.pt", **options)
            return
        sio.save_safetensors(state_of(generation), self.path, max_shard_nbytes=SIZES[num_files], **options)

    def reset(self):
        for entry in self.path.iterdir():
            entry.unlink()
        self.save(1, self.old, durable=False, digest="sha256")

    def check(self, *, sums_may_be_old=False):
        """The generation that is there, whole; a sum that is there is that of a file that is."""
        found = whole_set(self.path) if self.new else generation_of_tensors(torch.load(self.path / "model.pt"))
        for sums in self.path.glob("*.sha256"):
            status = os.system(f"cd {self.path} && sha256sum --check --strict --status {sums.name}")
            assert status == 0 or sums_may_be_old, f"{sums.name} does not fit"
        return found

    def check_next_save(self):
        age_temporaries(self.path)
        self.save(2, self.new, durable=False)
        assert self.check() == 2
        assert sorted(os.listdir(self.path)) == self.names, sorted(os.listdir(self.path))


def events_of(preload, folder):
    folder.reset()
    with preload.watching(record=1, no_sync=True) as control:
        folder.save(2, folder.new)
        total = control.total
    return preload.events()[:total]


def kills(preload, folder, *, exhaustive):
    counts = {"kills": 0, "new": 0}
    events = enumerate(events_of(preload, folder), 1)
    moments = [(at, AFTER) for at, event in events if exhaustive or event.call in CHANGES]
    moments += [(at, BEFORE) for at, _ in moments if exhaustive]
    for at, when in moments:
        folder.reset()

        def die(at=at, when=when):
            with preload.watching(no_sync=True, kill_at=at, kill_when=when):
                folder.save(2, folder.new)

        wait_until_killed(forked(die), f"call {at}")
        counts["kills"] += 1
        counts["new"] += folder.check() == 2
        if when == AFTER:
            folder.check_next_save()
    return counts


def errors(preload, folder, *, exhaustive):
    counts = {"faults": 0, "new": 0, "refused": 0}
    occurrences = {}
    for event in events_of(preload, folder):
        occurrence = occurrences[event.call] = occurrences.get(event.call, 0) + 1
        possible = ERRORS.get(event.call, OTHERS)[: 2 if exhaustive else 1]
        faults = [(error, occurrence, 0) for error in possible]
        faults += [(possible[0], FOREVER, 0)] * exhaustive
        faults += [(errno.EIO, occurrence, AFTERWARDS)] * (event.call in ("renameat", "fsync", "linkat", "unlinkat"))
        for error, last, how in faults:
            folder.reset()
            raised = None
            with preload.watching(no_sync=True, fail=event.call, error=error, first=occurrence, last=last, how=how):
                try:
                    folder.save(2, folder.new)
                except OSError as e:
                    raised = e
            what = f"{event} #{occurrence}: {errno.errorcode[error]}, {how}"
            # One that may not be looked at is not known to be a sum of the file.
            is_hidden = folder.digest is None and event.call in ("openat", "fstatat") and error == errno.EACCES
            found = folder.check(sums_may_be_old=is_hidden)
            assert raised is not None or found == 2, f"{what}: nothing was raised, and the old set is there"
            if raised is not None:
                assert str(folder.path) in str(raised.filename), f"{what}: {raised!r}"
                assert "sdio-tmp" not in str(raised), f"{what}: {raised!r}"
            counts["faults"] += 1
            counts["refused"] += raised is not None
            counts["new"] += found == 2
            folder.check_next_save()
    return counts


def main(directory, backend, what, old, new, sums, size):
    torch.set_num_threads(1)
    folder = Folder(directory, backend, int(old), int(new), {"sum": "sha256", "no-sum": None}[sums])
    counts = {"kills": kills, "errors": errors}[what](Preload(), folder, exhaustive=size == "exhaustive")
    shutil.rmtree(folder.path)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
