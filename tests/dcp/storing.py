"""Saves to a store, some of which go wrong in one rank. Runs inside ranks; the store is their parent's server."""

import contextlib
import os
import signal
import threading
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from statedict_io.dcp import SingleFileWriter

from . import failing, scenarios

with contextlib.suppress(ImportError):  # seconds, once for all ranks
    import botocore.session  # noqa: F401
    import s3fs

BUCKET = "bucket"
URL = f"s3://{BUCKET}/model.pt"
PART_NBYTES = 64 << 10


def use(options):
    """Has s3:// lead to the parent's server, with parts as small as there."""
    import fsspec.config

    from statedict_io.remote import part_sizes, s3_multipart
    from statedict_io.remote.multipart import PartLimits

    fsspec.config.conf["s3"] = options
    s3fs.S3FileSystem.retries = 2
    s3_multipart.LIMITS = PartLimits(PART_NBYTES, 5 << 30, 10_000)
    part_sizes.DEFAULT_PART_NBYTES = PART_NBYTES
    part_sizes._AT_ONCE_NBYTES = PART_NBYTES


def state_of(world_size, value):
    """Of some 30 parts: rows, columns, what every rank has, and a value that is no tensor."""
    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(301 * 257, dtype=torch.float64).reshape(301, 257) * value
    return {
        "rows": distribute_tensor(whole, mesh, [Shard(0)]),
        "columns": distribute_tensor(whole + 1, mesh, [Shard(1)]),
        "all": whole + 2,
        "few": torch.full((5,), value),
        "note": "kept",
    }


def save_all(rank, world_size, options, sharding, directory):
    """A model's state, and one with other values, each to a file and to the store; what this rank wrote of it there."""
    use(options)
    model = scenarios.build(sharding, world_size, width=1003)
    states = {
        "model.pt": get_model_state_dict(model),
        "training.pt": {**get_model_state_dict(model), "step": 7, "rates": [0.1, (2, torch.arange(3))]},
        "tiny.pt": {"w": torch.arange(5.0), "step": 7},
        "mixed.pt": state_of(world_size, 2.0),
    }
    told = []
    for name, state in states.items():
        dcp.save(state, storage_writer=SingleFileWriter(os.path.join(directory, name)))
        for backend in ("auto", "python") if name == "model.pt" else ("auto",):
            writer = SingleFileWriter(
                f"s3://{BUCKET}/{name}", backend=backend, progress=lambda *amounts: told.append(amounts)
            )
            dcp.save(state, storage_writer=writer)
    return told, writer.bytes_written


def save(rank, world_size, options, names=("model.pt",), overwrite=True):
    """Saves under each of the names; the texts of their errors, or None."""
    use(options)
    return [
        _error_of(
            lambda name=name: dcp.save(
                state_of(world_size, 2.0), storage_writer=SingleFileWriter(f"s3://{BUCKET}/{name}", overwrite=overwrite)
            )
        )
        for name in names
    ]


def save_with(rank, world_size, options_of_ranks):
    return save(rank, world_size, options_of_ranks[rank])[0]


def save_once_more(rank, world_size, options):
    """Somebody makes the object between the plan and the end."""
    use(options)
    writer = SingleFileWriter(URL, overwrite=False)
    prepare = writer.prepare_global_plan

    def somebody_is_quicker(plans):
        found = prepare(plans)
        import fsspec

        with fsspec.open(URL, "wb") as file:
            file.write(b"theirs")
        writer._check_may_replace = lambda: None  # nor does the look before the end see it
        return found

    writer.prepare_global_plan = somebody_is_quicker
    return _error_of(lambda: dcp.save(state_of(world_size, 2.0), storage_writer=writer))


def save_failing(rank, world_size, options, step, failing_rank, fault):
    use(options)
    strike = _strike(fault) if rank == failing_rank else lambda: None

    class Planner(DefaultSavePlanner):
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
            if step == "before its parts":
                strike()
            future = super().write_data(plan, planner)
            if step == "after its parts":
                strike()
            return future

        def finish(self, metadata, results):
            if step == "end":
                strike()
            super().finish(metadata, results)

    if step == "amid its parts" and rank == failing_rank:
        from statedict_io.remote.s3_multipart import S3MultipartUpload

        put_part = S3MultipartUpload.put_part

        def put_one_part(upload, number, data):
            put_part(upload, number, data)
            strike()

        S3MultipartUpload.put_part = put_one_part
    if step == "completion" and rank == failing_rank:
        from statedict_io.remote.s3_multipart import S3MultipartUpload

        S3MultipartUpload.complete = lambda *_, **__: strike()
    return _error_of(lambda: dcp.save(state_of(world_size, 2.0), storage_writer=Writer(URL), planner=Planner()))


class Planned(Exception):
    pass


def _strike(fault):
    def strike():
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise Planned("this rank fails")

    return strike


def save_async(rank, world_size, options, path):
    """The state is that of the call; then again, with the error of the future."""
    use(options)
    state = state_of(world_size, 2.0)
    dcp.save(state, storage_writer=SingleFileWriter(path))
    future = dcp.async_save(state, storage_writer=SingleFileWriter(URL))
    for tensor in (state["rows"].to_local(), state["all"]):
        tensor.fill_(-1)
    future.result()
    dist.barrier()
    use({**options, "key": "another" if rank == 1 else options["key"]})
    failed = dcp.async_save(state, storage_writer=SingleFileWriter(URL))
    return _error_of(failed.result)


def peak_of_save(rank, world_size, options, nbytes):
    """By how much a save of ``nbytes``, cut along columns, raises the peak of a rank's resident memory; parts are of
    the usual size."""
    import fsspec.config

    fsspec.config.conf["s3"] = options
    mesh = init_device_mesh("cpu", (world_size,))
    state = {"w": distribute_tensor(torch.ones(1024, nbytes // 4096), mesh, [Shard(1)])}
    first = {"w": distribute_tensor(torch.ones(1024, 2048), mesh, [Shard(1)])}
    dcp.save(first, storage_writer=SingleFileWriter(f"s3://{BUCKET}/first.pt"))  # whatever is loaded at first use
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = failing._status("VmRSS")
    dcp.save(state, storage_writer=SingleFileWriter(URL))
    return failing._status("VmHWM") - before


def _error_of(call):
    """Returns when everything that a failed call has left to do is done."""
    error = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except BaseException as e:  # CheckpointException is none of Exception
            error = f"{type(e).__name__}: {e}"
    for thread in threading.enumerate():
        if thread.name.startswith("statedict_io"):
            thread.join(20)
    return error
