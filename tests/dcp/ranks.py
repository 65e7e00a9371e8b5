"""Runs a function in every rank of a small job.

The ranks are forked from a server that has imported torch once, which takes seconds.
"""

import datetime
import multiprocessing
import os
import queue
import tempfile
import time
import traceback
import warnings

_PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "dcp.scenarios",
    "dcp.failing",
    "dcp.storing",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)

KILLED = "killed"


def run_ranks(world_size, function, *arguments, seconds=60, group_seconds=30):
    """What ``function(rank, world_size, *arguments)`` returned in each rank; the exception where it raised one,
    :data:`KILLED` where the process was killed.

    Args:
        world_size: number of ranks.
        function: of a module, since it is pickled.
        seconds: after which the test fails and what still runs is killed.
        group_seconds: timeout of the process group.
    """
    results = _context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            _context.Process(
                target=_rank_main,
                args=(rank, world_size, os.path.join(directory, "store"), group_seconds, results, function, arguments),
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, results, time.monotonic() + seconds)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(processes, results, deadline):
    found = {}
    while len(found) < len(processes):
        assert time.monotonic() < deadline, f"ranks hang: only {sorted(found)} of {len(processes)} came back"
        try:
            rank, value = results.get(timeout=0.1)
            found[rank] = value
        except queue.Empty:
            for rank, process in enumerate(processes):
                if rank not in found and process.exitcode is not None:
                    process.join()
                    time.sleep(0.1)  # its result may be on the way
                    if results.empty():
                        found[rank] = KILLED
    return [found[rank] for rank in range(len(processes))]


def all_well(results):
    """``results``, none of which may be a failure."""
    for rank, result in enumerate(results):
        if isinstance(result, BaseException) or result == KILLED:
            raise AssertionError(f"rank {rank}: {result} {getattr(result, 'text', '')}")
    return results


class RankError(Exception):
    """What a rank raised; ``text`` is its traceback, ``kind`` the name of its type."""

    def __init__(self, kind, text, seconds=0.0):
        super().__init__(kind, text, seconds)
        self.kind, self.text, self.seconds = kind, text, seconds

    def __str__(self):
        return f"{self.kind}\n{self.text}"


def _rank_main(rank, world_size, store, group_seconds, results, function, arguments):
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started = time.monotonic()
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=group_seconds),
        )
        started = time.monotonic()
        value = function(rank, world_size, *arguments)
    except BaseException as e:
        value = RankError(type(e).__name__, traceback.format_exc(), time.monotonic() - started)
    results.put((rank, value))
    results.close()
    results.join_thread()
