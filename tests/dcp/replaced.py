"""Readers of a file that another process replaces all the time: what they return has to be of one version.

Runs inside processes of its own.
"""

import contextlib
import io
import os
import random
import shutil
import sys
import time
import traceback

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import statedict_io as sio
from statedict_io.commands.inspect import describe
from statedict_io.conversion import convert
from statedict_io.dcp import SingleFileReader
from statedict_io.dcp.conversion import file_to_dcp

NUM_VERSIONS = 5
_SIZES = {"a": (300, 301), "b": (7,), "c": (64, 1024), "d": (50_000,)}


def state(version):
    """All values in it are ``version``; offsets and sizes differ from version to version."""
    tensors = {name: torch.full(size, float(version)) for name, size in _SIZES.items()}
    padding = {f"p{i}": torch.full((1 + 1000 * version,), float(version)) for i in range(version)}
    return {"first": torch.full((3 + 500 * version,), float(version)), **padding, **tensors, "step": version}


def write_versions(directory):
    """A file of each version in each format, for :func:`replace_until` to put in place."""
    os.makedirs(os.path.join(directory, "versions"))
    for version in range(NUM_VERSIONS):
        torch.save(state(version), version_path(directory, version, ".pt"))
        convert(version_path(directory, version, ".pt"), version_path(directory, version, ".safetensors"))
    for suffix in (".pt", ".safetensors"):
        shutil.copy(version_path(directory, 0, suffix), os.path.join(directory, f"model{suffix}"))


def version_path(directory, version, suffix):
    return os.path.join(directory, "versions", f"model{version}{suffix}")


def replace_until(over, directory, num_saves):
    """Saves one version after the other to the same path, until the event ``over``."""
    torch.set_num_threads(1)
    states = [state(version) for version in range(NUM_VERSIONS)]
    while not over.is_set():
        version = random.randrange(NUM_VERSIONS)
        sio.save(states[version], os.path.join(directory, "model.pt"), durable=False)
        copy = os.path.join(directory, ".copy")
        shutil.copy(version_path(directory, version, ".safetensors"), copy)
        os.replace(copy, os.path.join(directory, "model.safetensors"))
        num_saves.value += 1


def load_in_ranks(rank, world_size, directory, seconds, backend):
    """``dcp.load`` again and again; returns (loads, mixed ones, what was raised)."""
    counts = [0, 0]
    raised = []
    end = time.monotonic() + seconds
    going_on = [True]
    while going_on[0]:
        found = {name: torch.full(size, -1.0) for name, size in _SIZES.items()}
        found["step"] = -1
        try:
            dcp.load(found, storage_reader=SingleFileReader(os.path.join(directory, "model.pt"), backend=backend))
        except BaseException:  # CheckpointException is one
            raised.append(traceback.format_exc())
        everywhere = [None] * world_size
        dist.all_gather_object(everywhere, versions_in(found))
        counts[0] += 1
        counts[1] += len(set().union(*everywhere)) != 1
        going_on[0] = time.monotonic() < end
        dist.broadcast_object_list(going_on, src=0)
    return *counts, raised


def versions_in(value):
    """The numbers that occur anywhere in it."""
    if isinstance(value, torch.Tensor):
        return set(value.unique().tolist())
    if isinstance(value, dict):
        return set().union(*(versions_in(item) for item in value.values()))
    return {float(value)}


def _loaded_by_dcp(directory, backend):
    found = {name: torch.full(size, -1.0) for name, size in _SIZES.items()}
    found["step"] = -1
    reader = SingleFileReader(os.path.join(directory, "model.pt"), backend=backend)
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def _opened_lazily(directory, backend):
    with sio.open_checkpoint(os.path.join(directory, "model.pt"), backend=backend) as checkpoint:
        return {name: checkpoint[name] for name in checkpoint}


def _inspected(directory, backend):
    """As the version whose file it describes, offsets and serialization id included."""
    found = describe(os.path.join(directory, "model.pt"))
    for version in range(NUM_VERSIONS):
        expected = describe(version_path(directory, version, ".pt"))
        if _content(found) == _content(expected):
            return {"version": version}
    return {"none": -1, "of them": -2}


def _content(description):
    """Without what the file's name is in."""
    tensors = [(t["name"], t["shape"], t["nbytes"], t["record"]) for t in description["tensors"]]
    return tensors, description["totals"], description["format"].get("serialization_id")


def _converted_to_directory(directory, backend):
    target = os.path.join(directory, "converted")
    file_to_dcp(os.path.join(directory, "model.pt"), target, backend=backend)
    found = {name: torch.full(size, -1.0) for name, size in _SIZES.items()}
    found["step"] = -1
    dcp.load(found, checkpoint_id=target, no_dist=True)
    shutil.rmtree(target)
    return found


def _converted(source, target):
    def convert_and_load(directory, backend):
        path = os.path.join(directory, target)
        convert(os.path.join(directory, source), path)
        if target.endswith(".pt"):
            return torch.load(path)
        from safetensors.torch import load_file

        return load_file(path)

    return convert_and_load


READERS = {
    "dcp.load": _loaded_by_dcp,
    "open_checkpoint": _opened_lazily,
    "inspect": _inspected,
    "load": lambda directory, backend: sio.load(os.path.join(directory, "model.pt"), backend=backend),
    "load verify": lambda directory, backend: sio.load(
        os.path.join(directory, "model.pt"), backend=backend, verify=True
    ),
    "load mmap": lambda directory, backend: sio.load(
        os.path.join(directory, "model.pt"), backend=backend, mmap=True, verify=True
    ),
    "convert to a directory": _converted_to_directory,
    "convert to .safetensors": _converted("model.pt", "converted.safetensors"),
    "convert to .pt": _converted("model.safetensors", "converted.pt"),
}


def read_alone(rank, world_size, directory, seconds, backend, name):
    """As :func:`load_in_ranks`, of one of :data:`READERS`."""
    num_reads = mixed = 0
    raised = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        num_reads += 1
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = READERS[name](directory, backend)
            mixed += len(versions_in(found)) != 1
        except Exception:
            raised.append(traceback.format_exc())
    return num_reads, mixed, raised


def count_opens(rank, world_size, directory, backend, name):
    """How often one of :data:`READERS` opens the file that it reads, where Python sees it."""
    source = os.path.join(directory, "model.safetensors" if name == "convert to .pt" else "model.pt")
    READERS[name](directory, backend)  # whatever is done at first use
    opened = []

    def see(event, arguments):
        if event == "open" and arguments[0] == source:
            opened.append(arguments)

    sys.addaudithook(see)
    with contextlib.redirect_stdout(io.StringIO()):
        READERS[name](directory, backend)
    return len(opened)
