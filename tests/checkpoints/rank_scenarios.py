"""What each rank of a small job does; see dcp/ranks.py."""

import os
import signal

import torch
from torch import nn

import statedict_io as sio
from statedict_io.dcp import SingleFileWriter


def state_of(step):
    torch.manual_seed(step)
    return {"step": step, "model": nn.Linear(64, 64).state_dict(), "name": f"run of {step}"}


def save_some(rank, world_size, path, steps, dies):
    """Saves ``steps``; rank ``dies``, if it is none, is killed while it writes the last. The steps that were saved."""
    ckpts = sio.CheckpointDirectory(path, keep_last=2)
    done = []
    for step in steps:
        if step == steps[-1] and rank == dies:
            SingleFileWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        try:
            ckpts.save(state_of(step), step, step / 10, storage="dcp")
        except Exception as e:
            return done, type(e).__name__
        done.append(step)
    ckpts.close()
    return done, None


def resume(rank, world_size, path):
    """What each rank finds, and restores; the first one alone has warned."""
    import warnings

    ckpts = sio.CheckpointDirectory(path, keep_last=2)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = ckpts.latest(storage="dcp")
        model = nn.Linear(64, 64)
        step = ckpts.restore(model=model, storage="dcp")
    into = state_of(0)
    found.load_into(into)
    expected = state_of(found.step)
    equal = all(torch.equal(expected["model"][key], model.state_dict()[key]) for key in expected["model"])
    equal = equal and all(torch.equal(expected["model"][key], into["model"][key]) for key in expected["model"])
    told = any(issubclass(each.category, sio.CheckpointDirectoryWarning) for each in warned)
    return found.step, step, [each.step for each in found.skipped], equal, told


def fail_alike(rank, world_size, path):
    """The names of the errors that each rank gets where only the first one looks."""
    found = []
    for action in (
        lambda: sio.CheckpointDirectory(os.path.join(path, "file")).latest(storage="dcp"),
        lambda: sio.CheckpointDirectory(os.path.join(path, "file")).save({}, 1, storage="dcp"),
        lambda: sio.CheckpointDirectory(os.path.join(path, "run")).save({}, -1, storage="dcp"),
        lambda: sio.CheckpointDirectory(os.path.join(path, "run")).restore(step=77, storage="dcp"),
    ):
        try:
            action()
            found.append(None)
        except Exception as e:
            found.append(type(e).__name__)
    found.append(sio.CheckpointDirectory(os.path.join(path, "nowhere")).latest(storage="dcp"))
    return found
