"""A save of many ranks to a store that is a dictionary, in threads of one process: the parts, and what ranks send each
other by real connections, without DCP and without a network."""

import hashlib
import threading
import time

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from statedict_io.dcp import shared_upload
from statedict_io.dcp.exchange import Listener
from statedict_io.dcp.global_plan import GlobalState, LocalItems
from statedict_io.dcp.orders import WorkOrder
from statedict_io.dcp.part_writer import PartWriter
from statedict_io.remote import multipart_stores
from statedict_io.remote.multipart import PartLimits, SentPart
from statedict_io.remote.part_sizes import PartSizes
from statedict_io.remote.stores import Place
from statedict_io.writing.targets import URLTarget

PLACE = Place("store://model.pt", None, "model.pt")


class Store:
    """Of one object and the parts of one upload. ``fault(rank, number)`` is called for every part that is sent."""

    limits = PartLimits(least_nbytes=1 << 10, most_nbytes=1 << 30, max_num_parts=10_000)

    def __init__(self, monkeypatch, *, part_nbytes=2 << 10, connections=2):
        self.object = None
        self.parts = None
        self.fault = lambda rank, number: None
        self.num_aborted = 0
        self.lock = threading.Lock()
        sizes = PartSizes(connections, part_nbytes, self.limits.least_nbytes)
        monkeypatch.setattr(multipart_stores, "limits_of", lambda place: self.limits)
        monkeypatch.setattr(multipart_stores, "begin", lambda place, stop=None: Upload(self, "begun", "coordinator"))
        monkeypatch.setattr(multipart_stores, "put", self.put)
        monkeypatch.setattr(shared_upload.StoredSidecar, "remove", lambda sidecar: None)
        monkeypatch.setattr(shared_upload, "part_sizes", lambda fs, nbytes, limits: sizes)

    def put(self, place, data, *, replace=True):
        self.object = bytes(data)


class Upload:
    def __init__(self, store, ticket, rank):
        self.store, self.ticket, self.rank = store, ticket, rank
        self.limits = store.limits
        self.is_stopped = False
        if ticket == "begun" and rank == "coordinator":
            store.parts = {}

    def put_part(self, number, data):
        if self.is_stopped:
            raise OSError("stopped")
        self.store.fault(self.rank, number)
        with self.store.lock:
            assert self.store.parts is not None, "sent to an upload that is over"
            assert number not in self.store.parts
            self.store.parts[number] = bytes(data)
        return SentPart(number, len(data), hashlib.md5(data).hexdigest(), None)

    def complete(self, parts, *, replace=True):
        numbers = sorted(part.number for part in parts)
        assert numbers == sorted(self.store.parts)
        contents = [self.store.parts[number] for number in numbers]
        assert all(len(content) >= self.limits.least_nbytes for content in contents[:-1])
        self.store.object, self.store.parts = b"".join(contents), None

    def stop(self):
        self.is_stopped = True

    def abort(self):
        self.store.num_aborted += 1
        self.store.parts = None


class Planner:
    """Has a rank's shards."""

    def __init__(self, shards):
        self.shards = shards

    def resolve_data(self, item):
        return self.shards[item.index.fqn, tuple(item.index.offset)]


def cut_into_shards(state, cuts):
    """Each rank's shards: {(name, offsets): tensor}.

    Args:
        cuts: name -> (dimension, rank of each equal piece); a name that is missing is on all ranks.
    """
    num_ranks = 1 + max((rank for _, ranks in cuts.values() for rank in ranks), default=0)
    shards = [{} for _ in range(num_ranks)]
    for name, tensor in state.items():
        if name not in cuts:
            for each in shards:
                each[name, (0,) * tensor.dim()] = tensor
            continue
        dim, ranks = cuts[name]
        start = 0
        for rank, piece in zip(ranks, tensor.tensor_split(len(ranks), dim), strict=True):
            offsets = [0] * tensor.dim()
            offsets[dim] = start
            start += piece.shape[dim]
            if piece.numel():
                shards[rank][name, tuple(offsets)] = piece
    return shards


def plans_of(state, shards, addresses):
    plans, seen = [], set()
    for of_rank, address in zip(shards, addresses, strict=True):
        items = []
        for (name, offsets), shard in of_rank.items():
            tensor = state[name]
            chunk = ChunkStorageMetadata(torch.Size(offsets), shard.shape)
            kind = WriteItemType.TENSOR if shard.shape == tensor.shape else WriteItemType.SHARD
            data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), tensor.shape)
            items.append(WriteItem(MetadataIndex(name, torch.Size(offsets)), kind, None, data))
        kept = [item for item in items if (item.index.fqn, item.index.offset) not in seen]
        seen.update((item.index.fqn, item.index.offset) for item in items)
        paths = {name: (name,) for name in state}
        plans.append(SavePlan(kept, storage_data=LocalItems(tuple(items), address), planner_data=paths))
    return plans


def save(store, state, shards, *, connections=2, slow=None, progress=None, seconds=30):
    """Returns what each rank has written, or raised; the object is the store's.

    Args:
        slow: rank that starts a little later than the others.
        progress: called with (rank, bytes done, bytes total).
    """
    num_ranks = len(shards)
    listeners = [Listener() if num_ranks > 1 else None for _ in shards]
    plans = plans_of(state, shards, [listener and listener.address for listener in listeners])
    target = URLTarget(PLACE.url, PLACE, "model")
    shared = shared_upload.SharedUpload(
        target, GlobalState(plans), [plan.storage_data.address for plan in plans], None, replace=True, unpickle=None
    )
    results = [None] * num_ranks

    def run(rank):
        work = shared.work[rank]
        order = WorkOrder("", [], work.ranges, work.nbytes, shared.compute_crc32, shared.key, shared.parts_order(rank))
        upload = None if order.parts.ticket is None else Upload(store, "joined", rank)
        if rank == slow:
            time.sleep(0.1)
        try:
            report = progress and (lambda done, total: progress(rank, done, total))
            writer = PartWriter(
                order,
                work.items,
                Planner(shards[rank]),
                upload,
                listeners[rank],
                connections=connections,
                progress=report,
            )
            results[rank] = writer.write()
        except BaseException as e:
            results[rank] = e

    ranks = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(seconds)
        assert not rank.is_alive(), "a rank hangs"
    for listener in listeners:
        if listener is not None:
            listener.close()
    if any(isinstance(result, BaseException) for result in results):
        shared.abandon()
    else:
        shared.finish(results)
    return results, shared
