"""What a worker of `benchmarks.ranks` does: one rank of a job, which saves and loads its part when all others do."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import statedict_io as sio
from statedict_io.dcp import SingleFileReader, SingleFileWriter

from .measure import fsync

LAYER_NBYTES = 64 << 20
WIDTH = 4096


def start(rank: str, ranks: int, size: int, directory: str, layer: int = LAYER_NBYTES, **store: Any) -> Rank:
    """``store``: as of :meth:`Rank.use_store`."""
    started = Rank(int(rank), ranks, size, directory, layer)
    if store:
        started.use_store(**store)
    return started


class Rank:
    def __init__(self, rank: int, ranks: int, size: int, directory: str, layer: int) -> None:
        self.about = {"torch": torch.__version__}
        self.rank, self.directory = rank, directory
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
        rows = min(size, layer) // 4 // WIDTH
        torch.manual_seed(0)
        layers = [torch.nn.Linear(WIDTH, rows, bias=False) for _ in range(max(size // layer, 1))]
        self.model = torch.nn.Sequential(*layers)
        self.whole = {name: tensor.clone() for name, tensor in self.model.state_dict().items()} if rank == 0 else {}
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        self.state: Any = get_model_state_dict(self.model)

    def do_run(self, contender: str) -> dict[str, float]:
        """From a barrier until the last rank is done."""
        dist.barrier()
        started, cpu = time.perf_counter(), time.process_time()
        getattr(self, contender)()
        dist.barrier()
        return {"s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}

    def use_store(self, url: str, connections: int, object: str) -> None:
        import fsspec.config

        from .courier import KEY, REGION, SECRET

        self.object = object
        fsspec.config.conf["s3"] = {
            "key": KEY,
            "secret": SECRET,
            "endpoint_url": url,
            "client_kwargs": {"region_name": REGION},
            "max_concurrency": connections,
        }

    def one_object(self) -> None:
        dcp.save(self.state, storage_writer=SingleFileWriter(self.object))

    def do_empty(self) -> dict[str, float]:
        """Each save makes a new file, and pays for no other's removal."""
        for name in os.listdir(self.directory):
            if name.startswith("stock"):
                shutil.rmtree(f"{self.directory}/stock", ignore_errors=True)
            if name.endswith(".pt"):
                os.remove(f"{self.directory}/{name}")
        os.sync()
        return {}

    def close(self) -> None:
        dist.destroy_process_group()

    def one_file(self) -> None:
        dcp.save(self.state, storage_writer=SingleFileWriter(f"{self.directory}/one.pt"))

    def one_rank(self) -> None:
        if self.rank == 0:
            sio.save(self.whole, f"{self.directory}/rank.pt")

    def gather(self) -> None:
        full = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.rank == 0:
            torch.save(full, f"{self.directory}/gathered.pt")
            fsync(Path(self.directory, "gathered.pt"))

    def stock(self) -> None:
        dcp.save(self.state, storage_writer=dcp.FileSystemWriter(f"{self.directory}/stock"))
        if self.rank == 0:
            dcp_to_torch_save(f"{self.directory}/stock", f"{self.directory}/stock.pt")
            fsync(Path(self.directory, "stock.pt"))

    def load_one_file(self) -> None:
        dcp.load(self.state, storage_reader=SingleFileReader(f"{self.directory}/one.pt"))

    def load_stock(self) -> None:
        dcp.load(self.state, storage_reader=dcp.FileSystemReader(f"{self.directory}/stock"))
