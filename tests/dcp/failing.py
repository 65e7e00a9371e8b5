"""Saves that go wrong in one rank, at one step. Runs inside ranks."""

import os
import resource
import signal
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from statedict_io.dcp import SingleFileWriter, shared_save

#: step -> which ranks take it
STEPS = {
    "local plan": (0, 1),
    "global plan": (0,),
    "resolve": (0, 1),
    "write": (0, 1),
    "written": (0, 1),
    "frame": (0,),
    "commit": (0,),
}
# Where the writer itself fails, the coordinator knows when DCP's call raises; of others it finds out a little later.
AT_ONCE = ("resolve", "frame", "commit")


class Planned(Exception):
    pass


def save(rank, world_size, directory, backend, step, failing_rank, fault, keep=False):
    """A save over ``model.pt`` in which ``fault`` happens at ``step`` in ``failing_rank``; returns the name of the
    error, the seconds it took, and what lay in the directory when it had been handled."""
    path = os.path.join(directory, "model.pt")
    state = state_of(rank, value=2.0)
    strike = _strike(fault) if rank == failing_rank else lambda: None

    class Planner(DefaultSavePlanner):
        def create_local_plan(self):
            if step == "local plan":
                strike()
            return super().create_local_plan()

        def create_global_plan(self, all_plans):
            if step == "global plan":
                strike()
            return super().create_global_plan(all_plans)

        def resolve_data(self, write_item):
            if step == "resolve":
                strike()
            return super().resolve_data(write_item)

    class Writer(SingleFileWriter):
        def write_data(self, plan, planner):
            if step == "write":
                strike()
            future = super().write_data(plan, planner)
            if step == "written":
                strike()
            return future

    if rank == failing_rank and step == "frame":
        shared_save.ArchiveFrame.write = lambda *_, **__: strike()
    if rank == failing_rank and step == "commit":
        shared_save.Replacement.commit = lambda *_, **__: strike()
    dist.barrier()
    started = time.monotonic()
    error = kept = None
    try:
        dcp.save(state, storage_writer=Writer(path, backend=backend), planner=Planner())
    except BaseException as e:  # CheckpointException is none of Exception
        error = type(e).__name__
        cause = str(e)
        if keep:
            kept = e
    seconds = time.monotonic() - started
    if step not in AT_ONCE or fault == "killed" or kept is not None:
        time.sleep(0.3)
    if error is None:
        return None, seconds, [], ""
    return error, seconds, sorted(os.listdir(directory)), cause


def _strike(fault):
    def strike():
        if fault == "full disk":
            return _fill_disk()
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise Planned("this rank fails")

    return strike


def _fill_disk():
    """What a process may write ends in the middle of the file; ENOSPC needs a file system of one's own."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))


def state_of(rank, value):
    return {"big": torch.full((256 << 10,), value), "small": torch.full((7,), value), "rank": "all"}


def save_well(rank, world_size, path, backend):
    dcp.save(state_of(rank, value=3.0), storage_writer=SingleFileWriter(path, backend=backend))


def save_in_place(rank, world_size, path, backend):
    """Once well, and once with a rank that fails: the error there, or None."""
    writer = SingleFileWriter(path, backend=backend, atomic=False)
    dcp.save(state_of(rank, value=3.0), storage_writer=writer)
    assert torch.load(path)["small"].tolist() == [3.0] * 7
    dist.barrier()
    if rank == 1:
        _fill_disk()
    try:
        dcp.save(state_of(rank, value=4.0), storage_writer=writer)
    except BaseException as e:  # CheckpointException is none of Exception
        return str(e)
    return None


def save_async(rank, world_size, path, backend):
    """The state is that of the call; an error comes with the future."""
    state = state_of(rank, value=4.0)
    future = dcp.async_save(state, storage_writer=SingleFileWriter(path, backend=backend))
    state["big"].fill_(-1)
    future.result()
    below_a_file = os.path.join(path, "missing", "model.pt")
    failed = dcp.async_save(state, storage_writer=SingleFileWriter(below_a_file, backend=backend))
    try:
        failed.result()
    except BaseException as e:  # CheckpointException is none of Exception
        return str(e)
    return ""


def peak_of_save(rank, world_size, path, backend, nbytes, replicated):
    """By how much a save raises the peak of resident memory, and the bytes that this rank wrote."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    state = {f"t{i}": torch.full((1024, nbytes // 4 // 4 // 1024), float(i)) for i in range(4)}
    if not replicated:
        mesh = init_device_mesh("cpu", (world_size,))
        state = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in state.items()}
    save_well(rank, world_size, path + ".first", backend)  # whatever is loaded at first use
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    writer = SingleFileWriter(path, backend=backend)
    dcp.save(state, storage_writer=writer)
    return _status("VmHWM") - before, writer.bytes_written


def _status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))
