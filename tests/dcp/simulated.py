"""A save of many ranks, planned in one process; in ``tests``: ``python -m dcp.simulated [RANKS] [SHARDS]``."""

import os
import pickle
import resource
import sys
import tempfile
import time

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from statedict_io.dcp import SingleFileWriter
from statedict_io.dcp.orders import Written

ROWS = 16


def local_plans(num_ranks, num_shards):
    """One a rank, as ranks would send them: each tensor cut along its rows among all ranks, every tenth replicated."""
    num_tensors = -(-num_shards // num_ranks)
    plans = []
    properties = TensorProperties(dtype=torch.bfloat16)
    for rank in range(num_ranks):
        items = []
        for tensor in range(num_tensors):
            name = f"model.layers.{tensor // 12}.block.{tensor % 12}.weight"
            replicated = tensor % 10 == 9
            size = torch.Size([ROWS if replicated else ROWS * num_ranks, 1024])
            offsets = torch.Size([0 if replicated else ROWS * rank, 0])
            chunk = ChunkStorageMetadata(offsets, torch.Size([ROWS, 1024]))
            kind = WriteItemType.TENSOR if replicated else WriteItemType.SHARD
            items.append(WriteItem(MetadataIndex(name, offsets), kind, None, TensorWriteData(chunk, properties, size)))
        paths = {item.index.fqn: (item.index.fqn,) for item in items}
        plans.append(SavePlan(items, planner_data=paths))
    return plans


def dedup(plans):
    """What DCP's planner does with replicas, without its validation, which takes minutes."""
    seen = set()
    kept = []
    for plan in plans:
        items = [item for item in plan.items if item.type == WriteItemType.SHARD or item.index.fqn not in seen]
        seen.update(item.index.fqn for item in items if item.type == WriteItemType.TENSOR)
        kept.append(SavePlan(items, plan.storage_data, plan.planner_data))
    return kept


class Unfinished(Exception):
    pass


def simulate(num_ranks, num_shards, directory):
    """Plans the save and writes its frame; returns seconds, peak memory, sizes of messages and of the frame."""
    writer = SingleFileWriter(os.path.join(directory, "model.pt"), durable=False, backend="torch")
    plans = dedup([writer.prepare_local_plan(plan) for plan in local_plans(num_ranks, num_shards)])
    # Only the layout is of interest: no disk has room for the file.
    from statedict_io.dcp import shared_save

    shared_save.preallocate = lambda fd, nbytes: os.ftruncate(fd, nbytes)
    before = _peak()
    started = time.perf_counter()
    planned = writer.prepare_global_plan(plans)
    seconds = time.perf_counter() - started
    loads = [plan.storage_data.nbytes for plan in planned]
    message = len(pickle.dumps(planned[num_ranks // 2]))
    results = [
        [_result(Written(plan.storage_data.nbytes, plan.storage_data.ranges[::3][: plan.storage_data.num_ranges]))]
        for plan in planned
    ]
    for result in results:
        part = result[0].storage_data
        part.crcs = type(part.crcs)("I", bytes(4 * len(part.crcs)))
    reply = len(pickle.dumps(results[0]))
    started = time.perf_counter()
    frame = writer._save._first_frame
    frame.write(writer._save._file.fd, [0] * len(frame.storages()), {}, compute_crc32=True)
    written = time.perf_counter() - started
    writer._abandon()
    return {
        "plan_seconds": seconds,
        "frame_seconds": written,
        "peak_nbytes": _peak(),
        "added_nbytes": _peak() - before,
        "load_min": min(loads),
        "load_max": max(loads),
        "message_nbytes": message,
        "reply_nbytes": reply,
        "directory_nbytes": frame.nbytes - frame.layout.directory_offset,
        "file_nbytes": frame.nbytes,
        "records": len(frame.layout.records),
    }


def _result(written):
    from torch.distributed.checkpoint.storage import WriteResult

    return WriteResult(MetadataIndex("model.pt"), written.nbytes, written)


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


if __name__ == "__main__":
    ranks, shards = (int(argument) for argument in [*sys.argv[1:], "1024", "1000000"][:2])
    with tempfile.TemporaryDirectory() as scratch:
        for name, value in simulate(ranks, shards, scratch).items():
            print(f"{name:18} {value:,.2f}" if isinstance(value, float) else f"{name:18} {value:,}")
