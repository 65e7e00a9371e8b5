"""The shape every contender has. One contender lives alone in one worker process, so it may change global settings."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

StateDict = dict[str, Any]


class Unsupported(Exception):
    """This contender can't do what was asked on this machine or file system. Reported as skipped, not as failed."""


class Contender:
    key: ClassVar[str]
    """What `--contenders` calls it, and its key in the results."""
    label: ClassVar[str]
    durable: ClassVar[bool] = False
    """Whether save() returns with bytes *and* name on the device. Where not, the runner fsyncs and adds that time."""
    kind: ClassVar[str] = "peer"
    """peer | ours | raw: raw ones move the payload with no format at all and give the limit the others are held to."""
    needs_state: ClassVar[bool] = True
    """False: never looks at the state dict, only at its size; the worker then builds no case."""
    device_only: ClassVar[bool] = False
    """It is about copies from a device: skipped, before anything is imported, where the tensors are on the CPU."""
    writes_file: ClassVar[bool] = True
    module: ClassVar[str] = "torch"
    """What it cannot run without."""
    distribution: ClassVar[str | None] = None
    """Of which package the version is kept with the results."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.payload_nbytes = 0

    @classmethod
    def available(cls, op: str = "save") -> str | None:
        """None when it can run here, else the reason why not."""
        return import_error(cls.module)

    @classmethod
    def about(cls) -> dict[str, str]:
        """Versions and settings to be kept with the results."""
        return {} if cls.distribution is None else version_of(cls.distribution)

    def prepare(self, payload_nbytes: int) -> None:
        """Once per case, not timed: what a long-running program would set up once."""
        self.payload_nbytes = payload_nbytes

    def save(self, state_dict: StateDict, path: Path) -> None:
        raise NotImplementedError

    def load(self, path: Path) -> StateDict:
        raise NotImplementedError

    def read_back(self, path: Path) -> StateDict:
        """How the runner reads a saved file to check it; the independent reader where there is one."""
        return self.load(path)

    def remove(self, path: Path) -> None:
        """Removes what save() wrote; not timed."""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def processes(self) -> list[int]:
        """The processes whose CPU time and memory are this contender's."""
        return [os.getpid()]

    def close(self) -> None:
        """Ends what prepare() started."""


def import_error(module: str) -> str | None:
    """None when `module` imports, else why not. Imports for real: a package may be there and broken."""
    try:
        __import__(module)
    except Exception as error:
        return f"{module}: {type(error).__name__}: {error}"
    return None


def cuda_missing() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def version_of(distribution: str) -> dict[str, str]:
    try:
        return {distribution: metadata.version(distribution)}
    except metadata.PackageNotFoundError:
        return {}


def flat_tensors(tree: Any, prefix: str = "") -> StateDict:
    """The tensors of nested mappings and sequences under dotted names, as users of tensor-only formats do by hand."""
    import torch

    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    if isinstance(tree, dict):
        children = list(tree.items())
    elif isinstance(tree, (list, tuple)):
        children = list(enumerate(tree))
    else:
        return {}
    flat: StateDict = {}
    for name, child in children:
        flat.update(flat_tensors(child, f"{prefix}.{name}" if prefix else str(name)))
    return flat
