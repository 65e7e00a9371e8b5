"""Processes that save with torch.save: plain into DIRECTORY/ref, patched into DIRECTORY/ours; run by test_patching.py.

patching_process.py SCENARIO DIRECTORY
"""

import atexit
import multiprocessing
import os
import pathlib
import signal
import sys

import torch

import statedict_io as sio
from statedict_io.writing import patching

torch.set_num_threads(1)  # OpenMP's threads do not survive fork()


def state():
    return {"w": torch.randn(1000, generator=torch.Generator().manual_seed(0)), "step": 1}


def save_in_child(directory):
    torch.save(state(), pathlib.Path(directory, "model.pt"))


def save_and_check(directory, is_patched):
    path = pathlib.Path(directory, "model.pt")
    path.write_bytes(b"old")
    with open(path, "rb") as old:
        save_in_child(directory)
        assert (os.stat(path).st_ino != os.fstat(old.fileno()).st_ino) is is_patched


def in_child(method, function, *arguments):
    process = multiprocessing.get_context(method).Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def fork(ref, ours):
    """A forked child is patched as its parent is."""
    in_child("fork", save_in_child, ref)
    with sio.patch_torch():
        in_child("fork", save_and_check, ours, True)


def spawn(ref, ours):
    """A spawned one starts with torch as it is."""
    in_child("spawn", save_in_child, ref)
    with sio.patch_torch():
        in_child("spawn", save_and_check, ours, False)


def lock_held_at_fork(ref, ours):
    torch.save(state(), ref / "model.pt")
    patch = sio.patch_torch()
    with patching._lock:  # by this thread, which in the child is another
        import threading

        def forks():
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                patch.undo()
                sio.patch_torch()
                torch.save(state(), ours / "model.pt")
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0

        thread = threading.Thread(target=forks)
        thread.start()
        thread.join()
    patch.undo()


def ddp(ref, ours):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=ddp_rank, args=(rank, ref, ours)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0


def ddp_rank(rank, ref, ours):
    torch.distributed.init_process_group("gloo", init_method=f"file://{ref.parent}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        model(torch.full((4, 8), float(rank))).sum().backward()
        optimizer.step()

    def save(directory):
        everything = {"module": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(everything, directory / f"rank{rank}.pt")
        torch.distributed.barrier()
        assert torch.load(directory / f"rank{1 - rank}.pt")["module"].keys() == everything["module"].keys()
        # In the communication hooks' thread, and as objects over the wire, which are pickled.
        objects = [None, None]
        torch.distributed.all_gather_object(objects, {"rank": rank, "w": model.module.weight.detach()})
        assert [each["rank"] for each in objects] == [0, 1]

    step()
    save(ref)
    with sio.patch_torch():
        save(ours)
        step()
    torch.distributed.destroy_process_group()


def interpreter_exit(ref, ours):
    torch.save(state(), ref / "model.pt")
    sio.patch_torch()
    atexit.register(lambda: torch.save(state(), ours / "model.pt"))


if __name__ == "__main__":
    directories = [pathlib.Path(sys.argv[2], name) for name in ("ref", "ours")]
    for directory in directories:
        directory.mkdir()
    globals()[sys.argv[1]](*directories)
