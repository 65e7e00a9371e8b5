"""Many ranks into one file, against what people do today:

    python -m benchmarks.ranks [--size 1GiB] [--ranks 2] [--rounds 5] [--dir .]

Contenders, interleaved in the same processes, each timed from a barrier until the last rank is done and the file is
on the device: ``dcp.save`` through ``SingleFileWriter``; one rank's ``statedict_io.save`` of a state that it holds;
gathering to rank 0 and ``torch.save``, and fsync; ``dcp.save`` with the stock writer, ``dcp_to_torch_save``, and fsync.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import statedict_io as sio
from statedict_io.__main__ import _nbytes
from statedict_io.dcp import SingleFileReader, SingleFileWriter

from .turns import in_turn

_LAYER_NBYTES = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=_nbytes, default=1 << 30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", default=".")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.path.abspath(arguments.dir), prefix="bench-ranks-") as directory:
        options = (arguments.ranks, arguments.size, arguments.rounds, directory)
        mp.spawn(_rank, args=options, nprocs=arguments.ranks)


def _rank(rank: int, ranks: int, size: int, rounds: int, directory: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    width = 4096
    rows = _LAYER_NBYTES // 4 // width
    model = torch.nn.Sequential(
        *(torch.nn.Linear(width, rows, bias=False) for _ in range(max(size // _LAYER_NBYTES, 1)))
    )
    whole = model.state_dict() if rank == 0 else None
    whole = {name: tensor.clone() for name, tensor in whole.items()} if whole else None
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    state = get_model_state_dict(model)

    def one_file() -> None:
        dcp.save(state, storage_writer=SingleFileWriter(f"{directory}/one.pt"))

    def one_rank() -> None:
        if rank == 0:
            sio.save(whole, f"{directory}/rank.pt")

    def gather() -> None:
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            torch.save(full, f"{directory}/gathered.pt")
            _sync(f"{directory}/gathered.pt")

    def stock() -> None:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(f"{directory}/stock"))
        if rank == 0:
            dcp_to_torch_save(f"{directory}/stock", f"{directory}/stock.pt")
            _sync(f"{directory}/stock.pt")

    def load_one_file_cold() -> None:  # direct writes leave nothing in the page cache
        dcp.load(state, storage_reader=SingleFileReader(f"{directory}/one.pt"))

    def load_one_file_warm() -> None:
        dcp.load(state, storage_reader=SingleFileReader(f"{directory}/one.pt"))

    def load_stock_warm() -> None:
        dcp.load(state, storage_reader=dcp.FileSystemReader(f"{directory}/stock"))

    saves = [one_file, one_rank, gather, stock]
    loads = [load_one_file_cold, load_one_file_warm, load_stock_warm]
    seconds: dict[str, list[float]] = {contender.__name__: [] for contender in saves + loads}
    for round_ in range(rounds + 1):
        if rank == 0:  # each save makes a new file, and pays for no other's removal
            _empty(directory)
        for contender in in_turn(saves, round_) + loads:
            dist.barrier()
            started = time.perf_counter()
            contender()
            dist.barrier()
            if round_:  # the first warms up
                seconds[contender.__name__].append(time.perf_counter() - started)
    if rank == 0:
        _report(size, ranks, seconds)
    dist.destroy_process_group()


def _empty(directory: str) -> None:
    for name in os.listdir(directory):
        if name == "stock":
            shutil.rmtree(f"{directory}/stock")
        elif name.endswith(".pt"):
            os.remove(f"{directory}/{name}")
    os.sync()


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def _report(size: int, ranks: int, seconds: dict[str, list[float]]) -> None:
    for name, samples in seconds.items():
        median = statistics.median(samples)
        base = statistics.median(seconds["load_one_file_warm" if name.startswith("load") else "one_file"])
        print(f"{name:18} {median:7.3f} s  {size / median / 1e9:6.2f} GB/s  {median / base:5.2f}x")
    print(json.dumps({"size": size, "ranks": ranks, "torch": torch.__version__, "seconds": seconds}))


if __name__ == "__main__":
    main()
