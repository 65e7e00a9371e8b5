"""Jobs for the ranks: models sharded in every way, saved, loaded, compared. Runs inside ranks."""

import os
import zipfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._pytree import tree_map_only

from statedict_io.dcp import SingleFileReader, SingleFileWriter

SHARDINGS = ["replicated", "fsdp", "column", "row", "mesh", "hybrid"]


class Net(nn.Module):
    """Sizes that no number of ranks divides, a replicated buffer, a scalar, an empty tensor, two dtypes."""

    def __init__(self, width=67):
        super().__init__()
        self.up = nn.Linear(33, width)
        self.down = nn.Linear(width, 31, bias=False)
        self.norm = nn.LayerNorm(31)
        self.head = nn.Linear(31, 5).bfloat16()
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("none", torch.empty(0, 4))
        self.register_buffer("table", torch.arange(70_001, dtype=torch.int16))

    def forward(self, x):
        return self.head(self.norm(self.down(torch.relu(self.up(x)))).bfloat16())


def build(sharding, world_size, seed=0, width=67):
    torch.manual_seed(seed)
    model = Net(width)
    if sharding == "replicated":
        return model
    if sharding == "fsdp":
        mesh = init_device_mesh("cpu", (world_size,))
        for part in (model.up, model.down, model.norm, model.head):
            fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if sharding in ("column", "row"):
        mesh = init_device_mesh("cpu", (world_size,))
        style = ColwiseParallel() if sharding == "column" else RowwiseParallel()
        return parallelize_module(model, mesh, {"up": style, "down": style})
    outer = 2 if world_size % 2 == 0 else 1
    names = ("shard", "tensor") if sharding == "mesh" else ("replica", "shard")
    mesh = init_device_mesh("cpu", (outer, world_size // outer), mesh_dim_names=names)
    if sharding == "mesh":
        parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        mesh = mesh["shard"]
    for part in (model.up, model.down, model.norm, model.head):
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(sharding, world_size):
    """A model and its optimizer, which has state."""
    model = build(sharding, world_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def gathered(state):
    """Tensors with storages of their own: those that torch gathers may be views of padded ones."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.clone(), state)


_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_all(rank, world_size, sharding, directory, backends):
    """Saves a model's and a training state with each backend and with torch, into directories of those names; returns
    the bytes written of the model's."""
    model, optimizer = trained(sharding, world_size)
    if rank == 0:
        for name in (*backends, "expected"):
            os.makedirs(os.path.join(directory, name))
    dist.barrier()
    for name, state, full in (
        ("model.pt", get_model_state_dict(model), get_model_state_dict(model, options=_FULL)),
        ("training.pt", training(model, optimizer), training(model, optimizer, options=_FULL)),
    ):
        writers = [SingleFileWriter(os.path.join(directory, backend, name), backend=backend) for backend in backends]
        for writer in writers:
            dcp.save(state, storage_writer=writer)
        if name == "model.pt":
            written = [writer.bytes_written for writer in writers]
        if rank == 0:
            torch.save(gathered(full), os.path.join(directory, "expected", name))
    return written


def training(model, optimizer, **options):
    model_state, optimizer_state = get_state_dict(model, optimizer, **options)
    return {"model": model_state, "optimizer": optimizer_state, "step": 17, "rates": [0.1, (2, "x")], "note": "naïve"}


def load_all(rank, world_size, shardings, path, backends):
    """Loads a model's state into each sharding; returns (what is wrong, bytes read, bytes needed) of each."""
    found = []
    for sharding in shardings:
        for backend in backends:
            model = build(sharding, world_size, seed=1, width=257)
            state = get_model_state_dict(model)
            reader = SingleFileReader(path, backend=backend)
            dcp.load(state, storage_reader=reader)
            needed = sum(_local(tensor).nbytes for tensor in state.values())
            full = gathered(get_model_state_dict(model, options=_FULL))
            wrong = differences(dict(torch.load(path)), full) if rank == 0 else []
            found.append((wrong, reader.bytes_read, needed))
    return found


def load_from_store(rank, world_size, sharding, url, options):
    """Loads the state of ``build("replicated", 1, seed=5, width=257)`` from an object of S3; returns (what is wrong,
    bytes read, bytes needed)."""
    import fsspec.config

    fsspec.config.conf["s3"] = options
    model = build(sharding, world_size, seed=1, width=257)
    state = get_model_state_dict(model)
    reader = SingleFileReader(url)
    dcp.load(state, storage_reader=reader)
    needed = sum(_local(tensor).nbytes for tensor in state.values())
    full = gathered(get_model_state_dict(model, options=_FULL))
    wrong = differences(dict(build("replicated", 1, seed=5, width=257).state_dict()), full) if rank == 0 else []
    return wrong, reader.bytes_read, needed


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def load_training(rank, world_size, sharding, path, backend):
    """Saves a training state, forgets it, loads it; returns what differs."""
    model, optimizer = trained(sharding, world_size)
    before = gathered(training(model, optimizer, options=_FULL))
    dcp.save(training(model, optimizer), storage_writer=SingleFileWriter(path, backend=backend))
    state = training(model, optimizer)
    for tensor in _tensors(state):
        with torch.no_grad():
            _local(tensor).zero_()
    state.update(step=None, rates=None, note="")
    dcp.load(state, storage_reader=SingleFileReader(path, backend=backend))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    after = gathered(training(model, optimizer, options=_FULL))
    after.update(step=state["step"], rates=state["rates"], note=state["note"])
    return differences(before, after) if rank == 0 else []


def _tensors(state):
    found = []
    tree_map_only(torch.Tensor, found.append, state)
    return found


def differences(a, b, path=""):
    """Paths at which two nested states differ, in structure, type or value."""
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{path}: keys {list(a)} and {list(b)}"]
        return [line for key in a for line in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} items"]
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in differences(*pair, f"{path}.{i}")]
    equal = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
    return [] if equal else [path]


def storages(path):
    """(name, content) of the storages, in file order; the archive itself is checked."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = [name.partition("/")[2] for name in archive.namelist()]
        folder = archive.namelist()[0].partition("/")[0]
        return [(name, archive.read(f"{folder}/{name}")) for name in names if name.startswith("data/")]
