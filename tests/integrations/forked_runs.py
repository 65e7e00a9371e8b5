"""Runs an example again and again, each time in a process forked from one that has imported what takes seconds.

forked_runs.py EXAMPLE DIRECTORY, with a JSON list of runs on stdin; run by test_examples.py.

A run has a ``name``, ``arguments``, perhaps ``kill_after`` (steps, and seconds from then), ``stop_in_step`` (it gets
SIGTERM in the middle of that one) and ``move_to``: it works in DIRECTORY/work, which is then renamed so that the next
one starts afresh in a directory of the same name, as names are part of what is saved.
"""

import importlib.util
import json
import os
import pathlib
import signal
import sys
import time
import traceback

import torch

import statedict_io as sio


def main(example, directory):
    runs = json.load(sys.stdin)
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()  # imports half of torch
    spec = importlib.util.spec_from_file_location("example", example)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = {}
    for run in runs:
        work = pathlib.Path(directory, "work")
        work.mkdir(exist_ok=True)
        results[run["name"]] = in_fork(module, work, run)
        if "move_to" in run:
            work.rename(pathlib.Path(directory, run["move_to"]))
    json.dump(results, sys.stdout)


def in_fork(module, work, run):
    output, counts = work.parent / f"{run['name']}.out", work.parent / f"{run['name']}.counts"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if "stop_in_step" in run:
                signal_in_step(run["stop_in_step"])
            run_here(module, work, run["arguments"], output, counts)
            status = 0
        except SystemExit as e:
            status = e.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = None
    if "kill_after" in run:
        num_steps, seconds = run["kill_after"]
        while status is None and (not output.exists() or output.read_text().count("\nstep ") < num_steps):
            time.sleep(0.001)
            ended, ended_with = os.waitpid(child, os.WNOHANG)
            status = ended_with if ended else None
        time.sleep(seconds)
        if status is None:
            os.kill(child, signal.SIGKILL)
    if status is None:
        _, status = os.waitpid(child, 0)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "output": output.read_text(),
        "saves": int(counts.read_text()) if status == 0 else None,  # a kill can cut the count itself
    }


def signal_in_step(number):
    step, calls = torch.optim.AdamW.step, []

    def step_and_signal(*arguments, **options):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **options)

    torch.optim.AdamW.step = step_and_signal


def run_here(module, work, arguments, output, counts):
    os.chdir(work)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    saves = 0
    write = sio.writing.saving.write

    def counted(*arguments, **options):
        nonlocal saves
        saves += 1
        return write(*arguments, **options)

    sio.writing.saving.write = counted
    module.main(arguments)
    counts.write_text(str(saves))


if __name__ == "__main__":
    main(*sys.argv[1:])
