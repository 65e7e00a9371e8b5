"""statedict_io: both backends, durable or not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from .base import Contender, StateDict, flat_tensors


class StatedictIO(Contender):
    kind = "ours"
    module = "statedict_io"
    distribution = "statedict_io"
    backend: ClassVar[str]

    @classmethod
    def available(cls, op: str = "save") -> str | None:
        reason = super().available(op)
        if reason is not None:
            return reason
        import statedict_io as sio

        info = sio.backend_info()
        if cls.backend == "native" and info.name != "native":
            return f"the extension is not in use: {info.reason}"
        return None

    @classmethod
    def about(cls) -> dict[str, str]:
        import statedict_io as sio

        info = sio.backend_info()
        return {
            **super().about(),
            "statedict_io backend asked for": cls.backend,
            "statedict_io file": str(sio.__file__),
            "statedict_io built for torch": str(info.built_for_torch),
            "statedict_io simd": str(info.simd),
        }

    def save(self, state_dict: StateDict, path: Path) -> None:
        import statedict_io as sio

        sio.save(state_dict, path, durable=self.durable, backend=self.backend)

    def load(self, path: Path) -> StateDict:
        import statedict_io as sio

        return dict(sio.load(path, map_location=self.device, weights_only=True, backend=self.backend))

    def read_back(self, path: Path) -> StateDict:
        import torch

        return dict(torch.load(path, weights_only=True, map_location=self.device))


class NativeDurable(StatedictIO):
    key = "native"
    label = "statedict_io, durable"
    backend = "native"
    durable = True


class NativeFast(StatedictIO):
    key = "native_nodurable"
    label = "statedict_io, durable=False"
    backend = "native"


class FallbackDurable(StatedictIO):
    key = "fallback"
    label = "statedict_io, Python backend, durable"
    backend = "torch"
    durable = True


class FallbackFast(StatedictIO):
    key = "fallback_nodurable"
    label = "statedict_io, Python backend, durable=False"
    backend = "torch"


class SafetensorsDurable(NativeDurable):
    key = "native_safetensors"
    label = "statedict_io save_safetensors, durable"

    def save(self, state_dict: StateDict, path: Path) -> None:
        import statedict_io as sio

        sio.save_safetensors(flat_tensors(state_dict), path, durable=self.durable, backend=self.backend)

    def read_back(self, path: Path) -> StateDict:
        from safetensors.torch import load_file

        return load_file(path, device=self.device)


class SafetensorsFast(SafetensorsDurable):
    key = "native_safetensors_nodurable"
    label = "statedict_io save_safetensors, durable=False"
    durable = False


class NativeDigest(NativeDurable):
    key = "native_sha256"
    label = "statedict_io, durable, sha256"

    def save(self, state_dict: StateDict, path: Path) -> None:
        import statedict_io as sio

        sio.save(state_dict, path, durable=self.durable, backend=self.backend, digest="sha256")

    def remove(self, path: Path) -> None:
        super().remove(path)
        path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)


class NativeFastDigest(NativeDigest):
    key = "native_nodurable_sha256"
    label = "statedict_io, durable=False, sha256"
    durable = False


class NativePortableDigest(NativeDigest):
    """What a CPU without instructions for SHA-256 (and for CRC-32) does."""

    key = "native_portable_sha256"
    label = "statedict_io, durable, sha256, portable"

    @classmethod
    def available(cls, op: str = "save") -> str | None:
        os.environ["STATEDICT_IO_SIMD"] = "portable"  # this process is the contender's own
        return super().available(op)
