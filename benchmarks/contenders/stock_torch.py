"""torch.save as it comes, and the four things people do to it."""

from __future__ import annotations

import os
from pathlib import Path

from ..measure import fsync
from .base import Contender, StateDict, cuda_missing


class TorchSave(Contender):
    key = "torch"
    label = "torch.save"
    distribution = "torch"

    def save(self, state_dict: StateDict, path: Path) -> None:
        import torch

        torch.save(state_dict, path)

    def load(self, path: Path) -> StateDict:
        import torch

        return dict(torch.load(path, weights_only=True, map_location=self.device))


class TorchSaveNoCrc(TorchSave):
    key = "torch_nocrc"
    label = "torch.save, CRC off"

    def prepare(self, payload_nbytes: int) -> None:
        import torch

        super().prepare(payload_nbytes)
        torch.serialization.set_crc32_options(False)


class TorchSavePinned(TorchSave):
    key = "torch_pinned"
    label = "torch.save, pinned copies"
    device_only = True

    @classmethod
    def available(cls, op: str = "save") -> str | None:
        return cuda_missing() or (None if op == "save" else "the setting is about saving only")

    def prepare(self, payload_nbytes: int) -> None:
        from torch.utils.serialization import config

        super().prepare(payload_nbytes)
        config.save.use_pinned_memory_for_d2h = True


class TorchSavePinnedNoCrc(TorchSavePinned):
    key = "torch_pinned_nocrc"
    label = "torch.save, pinned, CRC off"

    def prepare(self, payload_nbytes: int) -> None:
        import torch

        super().prepare(payload_nbytes)
        torch.serialization.set_crc32_options(False)


class TorchSaveFsync(TorchSave):
    """fsync of the file, none of the directory: the bytes are safe, the name may not be."""

    key = "torch_fsync"
    label = "torch.save + fsync"

    def save(self, state_dict: StateDict, path: Path) -> None:
        import torch

        torch.save(state_dict, path)
        fsync(path)


class TorchSaveAtomic(TorchSave):
    key = "torch_atomic"
    label = "torch.save by hand: temporary, fsync, rename, fsync"
    durable = True

    def save(self, state_dict: StateDict, path: Path) -> None:
        import torch

        temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
        try:
            torch.save(state_dict, temporary)
            fsync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync(path.parent)
