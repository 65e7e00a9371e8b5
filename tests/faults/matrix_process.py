"""Makes every call of a save fail, in every way; run under preload.c.

    matrix_process.py DIRECTORY {native,torch,legacy,stock,safetensors,safetensors_torch}[-async] {quick,exhaustive}

Prints each failure and a summary, the last line, as JSON.
"""

import contextlib
import errno
import faulthandler
import fcntl
import gc
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from unittest import mock

import torch

import statedict_io as sio
from faults import ways
from faults.fault_oracle import REFUSED, SAVED, decisive, expected_errno, faults_of, leaves_temporary, steps_of
from faults.preload import AFTERWARDS, Preload
from statedict_io.writing import places, stock_saves

SECONDS_A_SAVE = 20
SMALL, LARGE = 3000, 12 << 20


class Laboratory:
    def __init__(self, directory, way, nbytes, durable, overwrite, *, leftover="no", copied=False):
        self.directory = pathlib.Path(directory, f"{way}-{nbytes}-{durable}-{overwrite}-{leftover}-{copied}")
        (self.directory / "in").mkdir(parents=True)
        tempfile.tempdir = str(self.directory / "private")  # where torch writes to if it cannot open the temporary
        os.mkdir(tempfile.tempdir)
        self.path = self.directory / "in" / "model.pt"
        self.way, self.nbytes, self.durable, self.overwrite = way, nbytes, durable, overwrite
        name = "model.0123456789ab-sdio-tmp" if leftover == "torch's" else ".model.pt.0123456789ab.sdio-tmp"
        self.leftover, self.leftover_path = leftover, self.path.with_name(name)
        self.holder = None
        self.copied = copied  # from a private file of torch's
        self.new = {"weight": torch.full((nbytes,), 2, dtype=torch.uint8)}
        self.old_file = self.directory / "old"
        self.old_file.write_bytes(b"the old checkpoint" * 100)
        self.old_file.chmod(0o640)
        if os.geteuid() == 0:
            os.chown(self.old_file, 1234, 1234)
        self.path.unlink(missing_ok=True)
        self.save()
        self.new_bytes = self.path.read_bytes()

    def __str__(self):
        words = [self.way, "large" if self.nbytes == LARGE else "small", "durable" if self.durable else "not durable"]
        words += ["overwrite" if self.overwrite else "fresh", f"{self.leftover} leftover", *["copied"] * self.copied]
        return ", ".join(words)

    def save(self):
        way, _, is_async = self.way.partition("-")
        with self.only_private_files_for_torch():
            if not is_async:
                ways.save_in(way, self.new, str(self.path), durable=self.durable)
                return
            with ways.options_for(way) as options:
                # The limit is given: nothing is asked about memory, where an error is no error of the save.
                options = {**options, "max_snapshot_nbytes": 1 << 30}
                sio.save_async(self.new, str(self.path), durable=self.durable, **options).result()

    def only_private_files_for_torch(self):
        if not self.copied:
            return contextlib.nullcontext()
        return mock.patch.object(stock_saves, "_opens", lambda path, fd: False)

    def reset(self):
        places._in_order_only.clear()  # a refused write must not decide about the next save
        for entry in self.directory.joinpath("in").iterdir():
            entry.unlink()
        for name in os.listdir(tempfile.tempdir):
            shutil.rmtree(os.path.join(tempfile.tempdir, name))
        if self.overwrite:
            os.link(self.old_file, self.path)  # a save replaces the name and leaves this file alone
        self.leave()

    def leave(self):
        """What a save an hour ago has left, or one that still goes on."""
        if self.holder is not None:
            os.close(self.holder)
            self.holder = None
        if self.leftover != "no":
            self.leftover_path.write_bytes(b"left over")
            os.utime(self.leftover_path, (time.time() - 3600,) * 2)
        if self.leftover == "held":
            self.holder = os.open(self.leftover_path, os.O_WRONLY)
            fcntl.flock(self.holder, fcntl.LOCK_EX)

    def enumerate(self, preload):
        self.reset()
        with preload.watching(record=1, no_sync=True):
            self.save()
        return steps_of(preload.events(), str(self.path), overwrite=self.overwrite)

    def try_fault(self, preload, steps, step, fault):
        """None, or what is wrong."""
        self.reset()
        before = self.resources()
        error = None
        faulthandler.dump_traceback_later(SECONDS_A_SAVE, exit=True)
        with preload.watching(
            no_sync=True, fail=fault.call, error=fault.error, first=fault.first, last=fault.last, how=fault.how
        ) as control:
            try:
                self.save()
            except Exception as e:
                error = e
                if self.way == "stock":
                    error.__traceback__ = error.__context__ = None  # torch's writer in its frames has its file open
        faulthandler.cancel_dump_traceback_later()
        if not control.fired:
            return "the call was not made again"
        decides, right = decisive(steps, step, fault, stock=self.way == "stock")
        return self.judge(decides, right, fault, error, before)

    def judge(self, step, right, fault, error, before):
        outcome = SAVED if error is None else REFUSED
        if outcome not in right:
            return f"{outcome}, not {' or '.join(sorted(right))}: {error!r}"
        if error is not None:
            if not isinstance(error, OSError):
                # torch's zip writer reports a RuntimeError and loses the errno.
                by_torch = self.way == "stock" and "write" in fault.call and isinstance(error, RuntimeError)
                return self.left_behind(step, fault, outcome, before) if by_torch else f"not an OSError: {error!r}"
            if (
                error.errno != expected_errno(step, fault)
                or error.filename != str(self.path)
                or error.filename2 is not None
            ):
                return f"errno {error.errno}, filename {error.filename!r}, filename2 {error.filename2!r}: {error!r}"
            if "None" in str(error) or "sdio-tmp" in str(error):
                return f"says {error}"
        return self.left_behind(step, fault, outcome, before)

    def left_behind(self, step, fault, outcome, before):
        renamed = step.stage == "settle" or (step.stage == "rename" and fault.how == AFTERWARDS)
        # A group that could not be kept gets nothing; nor does one where no mode can be set.
        refused = (fault.call == "fchown" and fault.persistent) or (fault.call, fault.error) == ("fchmod", errno.EPERM)
        mode = 0o600 if refused else 0o640 if self.overwrite else 0o666 & ~UMASK
        wrong = self.wrong_content(mode, new=outcome == SAVED or renamed)
        if wrong:
            return wrong
        others = [p for p in self.path.parent.iterdir() if p != self.path]
        # What was left by another is removed if it can be.
        cannot_look = outcome == REFUSED or fault.call in ("open", "stat", "fstatat", "flock") or step.stage == "clean"
        cannot_look = cannot_look or (step.stage == "try lock" and fault.persistent)
        if self.leftover == "held" and self.leftover_path not in others:
            return "another save's temporary is gone"
        left = [p.name for p in others if p != self.leftover_path or not (cannot_look or self.leftover == "held")]
        left += os.listdir(tempfile.tempdir)
        if left and not leaves_temporary(fault):
            return f"left {left}"
        after = self.resources()
        deadline = time.monotonic() + 2
        while after[1] > before[1] and time.monotonic() < deadline:  # one that was joined may still be listed
            time.sleep(0.001)
            after = self.resources()
        if after[0] != before[0] or after[1] > before[1]:
            return f"descriptors and threads {before} before, {after} after"
        return None

    def wrong_content(self, mode, *, new):
        try:
            found = self.path.read_bytes()
        except FileNotFoundError:
            return "the target is gone" if new or self.overwrite else None
        if new:
            if found != self.new_bytes:
                return "not the new file's bytes"
            return None if self.path.stat().st_mode & 0o777 == mode else f"mode {self.path.stat().st_mode:o}"
        return None if self.overwrite and found == self.old_file.read_bytes() else "neither the old file nor none"

    def resources(self):
        if self.way == "stock":
            gc.collect()  # or in a cycle
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def laboratories(directory, way):
    for nbytes, durable, overwrite in itertools.product((SMALL, LARGE), (True, False), (True, False)):
        if way not in ("legacy", "stock") or nbytes == SMALL:
            yield Laboratory(directory, way, nbytes, durable, overwrite)
    if way == "stock":
        yield Laboratory(directory, way, SMALL, True, True, copied=True)
    yield Laboratory(directory, way, SMALL, True, True, leftover="file")
    yield Laboratory(directory, way, SMALL, False, True, leftover="torch's")
    yield Laboratory(directory, way, SMALL, True, False, leftover="held")


UMASK = os.umask(0o022)
os.umask(UMASK)


def main(directory, way, size):
    preload, tried, failures, errors, num_calls = Preload(), 0, 0, set(), 0
    gc.freeze()  # what is there already need not be searched thousands of times
    for laboratory in laboratories(directory, way):
        steps = laboratory.enumerate(preload)
        num_calls += len(steps)
        for step in steps:
            if laboratory.nbytes == LARGE and size == "quick" and step.stage not in ("write", "commit"):
                continue  # as for the small file
            for fault in faults_of(step.event.call, step.occurrence, exhaustive=size == "exhaustive"):
                tried += 1
                errors.add((fault.error, fault.how))
                wrong = laboratory.try_fault(preload, steps, step, fault)
                if wrong:
                    failures += 1
                    print(f"{laboratory}; {step.stage}: {fault} [{step.event}]: {wrong}", flush=True)
    print(json.dumps({"way": way, "calls": num_calls, "errors": len(errors), "faults": tried, "failures": failures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
