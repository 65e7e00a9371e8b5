"""All contenders by key, in the order in which tables list them."""

from __future__ import annotations

from . import ours, peers, raw, stock_torch
from .base import Contender

ALL: dict[str, type[Contender]] = {
    contender.key: contender
    for contender in (
        stock_torch.TorchSave,
        stock_torch.TorchSaveNoCrc,
        stock_torch.TorchSavePinned,
        stock_torch.TorchSavePinnedNoCrc,
        stock_torch.TorchSaveFsync,
        stock_torch.TorchSaveAtomic,
        peers.Safetensors,
        peers.SafetensorsFsync,
        peers.Tensorizer,
        peers.TorchCheckpointing,
        peers.DistributedCheckpoint,
        peers.DistributedCheckpointThreads,
        peers.DeepSpeedFastFileWriter,
        ours.NativeDurable,
        ours.NativeFast,
        ours.SafetensorsDurable,
        ours.SafetensorsFast,
        ours.NativeDigest,
        ours.NativeFastDigest,
        ours.NativePortableDigest,
        ours.FallbackDurable,
        ours.FallbackFast,
        raw.RawBuffered,
        raw.RawDirect,
        raw.RawTmpfs,
        raw.RawPinnedCopy,
    )
}

__all__ = ["ALL", "Contender"]
