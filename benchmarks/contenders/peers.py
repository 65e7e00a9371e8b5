"""Other formats' own writers, each called the way its documentation calls it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..measure import fsync
from .base import Contender, StateDict, cuda_missing, flat_tensors


class Safetensors(Contender):
    key = "safetensors"
    label = "safetensors save_file"
    module = "safetensors.torch"
    distribution = "safetensors"

    def save(self, state_dict: StateDict, path: Path) -> None:
        from safetensors.torch import save_file

        save_file(flat_tensors(state_dict), path)

    def load(self, path: Path) -> StateDict:
        from safetensors.torch import load_file

        return load_file(path, device=self.device)


class SafetensorsFsync(Safetensors):
    """What a careful user adds: bytes and name are on the device."""

    key = "safetensors_fsync"
    label = "safetensors save_file + fsync"
    durable = True

    def save(self, state_dict: StateDict, path: Path) -> None:
        super().save(state_dict, path)
        fsync(path)
        fsync(path.parent)


class Tensorizer(Contender):
    key = "tensorizer"
    label = "tensorizer"
    module = "tensorizer"
    distribution = "tensorizer"

    def save(self, state_dict: StateDict, path: Path) -> None:
        from tensorizer import TensorSerializer

        serializer = TensorSerializer(str(path))
        serializer.write_state_dict(flat_tensors(state_dict))
        serializer.close()

    def load(self, path: Path) -> StateDict:
        from tensorizer import TensorDeserializer

        with TensorDeserializer(str(path), device=self.device) as deserializer:
            return dict(deserializer.items())


class TorchCheckpointing(Contender):
    """Its synchronous saver, buffered: with its O_DIRECT default version 0.1.1 hands unaligned buffers to the kernel,
    which on ext4 ends in EINVAL."""

    key = "torch_checkpointing"
    label = "torch_checkpointing (sync)"
    module = "torch_checkpointing"
    distribution = "torch_checkpointing"

    def prepare(self, payload_nbytes: int) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        super().prepare(payload_nbytes)
        config = CheckpointManager.Config.with_sync_save()
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(config)

    def save(self, state_dict: StateDict, path: Path) -> None:
        if path.exists():
            shutil.rmtree(path)  # it refuses an occupied destination, so replacing one is the user's work and time
        self._manager.save(str(path), {"state": state_dict})

    def load(self, path: Path) -> StateDict:
        return dict(self._manager.load(path, into={"state": None}, map_location=self.device)["state"])

    def close(self) -> None:
        self._manager.close()


class DistributedCheckpoint(Contender):
    """One process. Fsyncs its files but not their directory, hence not `durable`; that last fsync costs little."""

    key = "dcp"
    label = "torch.distributed.checkpoint, one file"
    module = "torch.distributed.checkpoint"
    distribution = "torch"
    threads = 1

    def save(self, state_dict: StateDict, path: Path) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(path, single_file_per_rank=True, sync_files=True, thread_count=self.threads)
        dcp.save(state_dict, storage_writer=writer, no_dist=True)

    def load(self, path: Path) -> StateDict:
        import torch
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        reader = dcp.FileSystemReader(path)
        state: dict[str, Any] = {}
        for name, entry in reader.read_metadata().state_dict_metadata.items():
            is_tensor = isinstance(entry, TensorStorageMetadata)
            state[name] = (
                torch.empty(entry.size, dtype=entry.properties.dtype, device=self.device) if is_tensor else None
            )
        dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
        return state


class DistributedCheckpointThreads(DistributedCheckpoint):
    key = "dcp_threads"
    label = "torch.distributed.checkpoint, 4 threads, 4 files"
    threads = 4


class DeepSpeedFastFileWriter(Contender):
    """FastPersist's writer under torch.save, with the buffer and queue sizes of DeepSpeed's own examples."""

    key = "deepspeed"
    label = "DeepSpeed FastFileWriter"
    module = "deepspeed.io"
    distribution = "deepspeed"
    device_only = True

    @classmethod
    def available(cls, op: str = "save") -> str | None:
        reason = cuda_missing() or super().available(op)
        if reason is not None:
            return reason
        from deepspeed.ops.op_builder import AsyncIOBuilder

        return None if AsyncIOBuilder().is_compatible(verbose=False) else "DeepSpeed's async_io operator can't be built"

    def prepare(self, payload_nbytes: int) -> None:
        import torch
        from deepspeed.ops.op_builder import AsyncIOBuilder

        super().prepare(payload_nbytes)
        self._handle = (
            AsyncIOBuilder()
            .load(verbose=False)
            .aio_handle(
                block_size=8 << 20, queue_depth=8, single_submit=False, overlap_events=True, intra_op_parallelism=4
            )
        )
        self._pinned = torch.zeros(64 << 20, dtype=torch.uint8).pin_memory()

    def save(self, state_dict: StateDict, path: Path) -> None:
        import torch
        from deepspeed.io import FastFileWriter, FastFileWriterConfig

        path.unlink(missing_ok=True)  # it never truncates
        config = FastFileWriterConfig(dnvme_handle=self._handle, pinned_tensor=self._pinned, double_buffer=True)
        writer = FastFileWriter(file_path=str(path), config=config)
        torch.save(state_dict, writer)
        writer.close()

    def load(self, path: Path) -> StateDict:
        import torch

        return dict(torch.load(path, weights_only=True, map_location=self.device))
