"""Makes every call of a save into a directory fail, and every call of a search; run under preload.c.

    checkpoints.faults_process DIRECTORY {native,torch} {quick,exhaustive}

``quick`` leaves out what the save of the checkpoint itself does: faults/matrix_process.py has that. Prints each failure
and a summary, the last line, as JSON.
"""

import collections
import contextlib
import errno
import faulthandler
import gc
import json
import os
import pathlib
import sys
import warnings
from unittest import mock

import torch
from faults.fault_oracle import faults_of
from faults.preload import Preload

import statedict_io as sio
from statedict_io.writing import places, saving

SECONDS_A_CALL = 20


def state_of(step):
    return {"step": step, "weight": torch.full((3000,), step, dtype=torch.uint8)}


class Laboratory:
    """A directory with steps 1 and 2, of which a save of step 3 is to leave itself alone; and links."""

    def __init__(self, directory, backend):
        self.backend = backend
        self.template, self.path = pathlib.Path(directory, "template"), pathlib.Path(directory, "run")
        self.path.mkdir()
        with sio.CheckpointDirectory(self.template, links=True) as ckpts:
            for step in (1, 2):
                ckpts.save(state_of(step), step, step / 10)

    def reset(self):
        places._cannot_rename.clear()  # or facts would be written in place ever after one was refused
        for entry in list(self.path.iterdir()):
            entry.unlink()
        for entry in self.template.iterdir():
            os.link(entry, self.path / entry.name, follow_symlinks=False)

    def save(self, step=3):
        with sio.CheckpointDirectory(self.path, keep_last=1, best="min", links=True) as ckpts:
            ckpts.save(state_of(step), step, step / 10, backend=self.backend)

    def check_saved(self, error, fault):
        """None, or what is wrong after a save of step 3 that ended in ``error``. EAGAIN of flock() says that another
        process has the lock."""
        is_told = isinstance(error, sio.CheckpointDirectoryInUseError) and fault.error == errno.EAGAIN
        if error is not None and not (isinstance(error, OSError) or is_told):
            return f"not an OSError: {error!r}"
        if error is not None and ".sdio-tmp" in str(error):
            return f"says {error}"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = sio.CheckpointDirectory(self.path).latest()
        if found is None or found.step not in ((3,) if error is None else (2, 3)):
            return f"found {found} after {error!r}"
        if found.metric != found.step / 10 or not bool((found.load()["weight"] == found.step).all()):
            return f"{found}: metric {found.metric}, or another content"
        for link in ("latest", "best"):
            if (self.path / link).is_symlink() and not (self.path / link).exists():
                return f"{link} leads nowhere"
        self.save(4)
        expected = {"latest", "best", "step-00000004.pt", "step-00000004.pt.json"}
        left = set(os.listdir(self.path)) ^ expected
        return f"after the next save there is {left}" if left else None

    def search(self):
        return sio.CheckpointDirectory(self.path).latest(backend=self.backend)

    def check_found(self, result):
        if isinstance(result, OSError):
            return None
        if isinstance(result, BaseException) or result is None:
            return f"found {result!r}"
        skipped = [each.step for each in result.skipped]
        return None if (result.step, skipped) in ((2, []), (1, [2])) else f"found {result}, skipped {skipped}"


def resources():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def attempt(preload, action, fault=None):
    """What ``action`` returned or raised, and whether the fault was met."""
    options = {}
    if fault is not None:
        options = {"fail": fault.call, "error": fault.error, "first": fault.first, "last": fault.last, "how": fault.how}
    faulthandler.dump_traceback_later(SECONDS_A_CALL, exit=True)
    with warnings.catch_warnings(), preload.watching(no_sync=True, record=fault is None, **options) as control:
        warnings.simplefilter("ignore")
        try:
            result = action()
        except Exception as e:
            result = e.with_traceback(None)
            result.__context__ = result.__cause__ = None
    faulthandler.cancel_dump_traceback_later()
    return result, control.fired


@contextlib.contextmanager
def unwatched_saves(preload):
    """Saves of checkpoints themselves are not counted and do not fail in the block."""
    real = saving.save

    def save(*arguments, **options):
        was_active, preload.control.active = preload.control.active, 0
        try:
            real(*arguments, **options, durable=False)
        finally:
            preload.control.active = was_active

    with mock.patch.object(saving, "save", save):
        yield


def main(directory, backend, size):
    torch.set_num_threads(1)
    laboratory, preload = Laboratory(directory, backend), Preload()
    gc.freeze()  # what is there already need not be searched thousands of times
    with unwatched_saves(preload) if size == "quick" else contextlib.nullcontext():
        run(laboratory, preload, size)


def run(laboratory, preload, size):
    failures = []
    counts = collections.Counter()
    for what in ("save", "search"):
        action = getattr(laboratory, what)
        laboratory.reset()
        action()
        laboratory.reset()
        result, _ = attempt(preload, action)
        assert not isinstance(result, BaseException), result
        occurrences = collections.Counter()
        for event in preload.events():
            occurrences[event.call] += 1
            counts[f"{what}: {event.call}"] += 1
            for fault in faults_of(event.call, occurrences[event.call], exhaustive=size == "exhaustive"):
                laboratory.reset()
                before = resources()
                result, fired = attempt(preload, action, fault)
                error = result if isinstance(result, BaseException) else None
                counts["not met"] += not fired  # threads come in another order
                wrong, after = None, resources()
                if after != before:
                    wrong = wrong or f"{before} descriptors before, {after} after"
                with preload.watching(no_sync=True):
                    judged = laboratory.check_saved(error, fault) if what == "save" else laboratory.check_found(result)
                counts["faults"] += 1
                counts[f"{what} refused"] += error is not None
                if wrong or judged:
                    failures.append(f"{what}: {fault} [{event}]: {wrong or judged}")
                    print(failures[-1], flush=True)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
