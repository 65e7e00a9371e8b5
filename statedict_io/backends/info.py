"""Which backend is active, and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..installed import proofs
from ..installed.proofs import ProofReport
from . import PYTHON, extension, native_backend, not_reproduced, python_backend, reproduction
from .extension import ModuleInfo


@dataclass(frozen=True)
class BackendInfo:
    """Which backend ``backend="auto"`` uses, and why."""

    name: str  #: "native" or "python"
    reason: str  #: in words; where ``_core`` is not used, with the cure
    built_for_torch: str | None  #: release that the ``_torch`` module was built for; None where none is in use
    torch: str  #: version found
    simd: str | None  #: the CRC-32 implementation in use; None without ``_core``
    core: ModuleInfo  #: of the compiled module that needs nothing of torch
    torch_module: ModuleInfo  #: of the compiled module for this release of torch, which drives devices
    proofs: dict[str, ProofReport] = field(hash=False)  #: by name, what this process has proved of the installed torch

    def __str__(self) -> str:
        lines = [
            f"backend: {self.name} ({self.reason})",
            f"torch: {self.torch}",
            f"_core: {self.core}" + (f", CRC-32 with {self.simd}" if self.simd is not None else ""),
            f"_torch: {self.torch_module}",
            *(f"proof of {name}: {report}" for name, report in self.proofs.items()),
        ]
        return "\n".join(lines)


def backend_info() -> BackendInfo:
    """Tells which backend is active and why. Never raises."""
    found = extension.find()
    reason = found.core_info.reason
    backend = native_backend() or python_backend()
    chosen = backend.name
    if not (verdict := reproduction.reproduced_by(backend)):
        chosen = PYTHON
        reason = not_reproduced(verdict) if found.core is not None else f"{reason}; {not_reproduced(verdict)}"
    return BackendInfo(
        name=chosen,
        reason=reason,
        built_for_torch=found.built_for_torch,
        torch=torch.__version__,
        simd=found.core.simd() if found.core is not None else None,
        core=found.core_info,
        torch_module=found.torch_info,
        proofs=proofs.reports(),
    )
