"""Putting a state back into a model, an optimizer and whatever else has ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import StateDictIOError
from .entry import SavedCheckpoint
from .finder import Finder
from .folder import Listed
from .soundness import Level
from .trainable import load_model

# Names under which people save the same thing.
_ALSO = {
    "model": ("model_state_dict", "state_dict", "net"),
    "optimizer": ("opt", "optim", "optimizer_state_dict"),
    "scheduler": ("lr_scheduler", "schedule", "scheduler_state_dict"),
    "scaler": ("grad_scaler", "scaler_state_dict"),
}


@dataclass(frozen=True)
class Loading:
    """How checkpoints are loaded, and checked meanwhile."""

    finder: Finder
    level: Level
    map_location: Any
    weights_only: bool
    backend: str

    def load(self, entry: SavedCheckpoint) -> Any:
        """
        Raises:
            CorruptCheckpointError: it is damaged.
            Exception: what :func:`load` raises.
        """
        if self.level == "digest":
            entry.check_digest()
        return entry.load(
            self.map_location,
            weights_only=self.weights_only,
            backend=self.backend,
            verify=self.level in ("crc", "digest"),
        )

    def load_if_sound(self, entry: SavedCheckpoint, listed: Listed) -> Any:
        """For :meth:`Finder.first`."""
        if self.level:
            self.finder.check("structure", self.backend)(entry, listed)
        with self.finder.judging(listed):
            return self.load(entry)


def check_parts(parts: Mapping[str, Any]) -> None:
    """
    Raises:
        TypeError: one of them cannot be restored.
    """
    for name, part in parts.items():
        if not callable(getattr(part, "load_state_dict", None)):
            raise TypeError(f"restore({name}=...): {type(part).__name__} has no load_state_dict")


def restore_parts(parts: Mapping[str, Any], state: Any, path: str) -> None:
    """Everything is looked up before the first part is changed.

    Raises:
        StateDictIOError: the state is no dict, or has nothing for one of them.
        Exception: what ``load_state_dict`` raises.
    """
    if not parts:
        return
    if not isinstance(state, Mapping):
        raise StateDictIOError(f"{path}: holds a {type(state).__name__}, not a dict of parts to restore")
    found = [(part, _looked_up(name, state, path)) for name, part in parts.items()]
    for part, saved in found:
        if isinstance(part, torch.nn.Module):
            load_model(part, saved)
        else:
            part.load_state_dict(saved)


def _looked_up(name: str, state: Mapping[Any, Any], path: str) -> Any:
    for key in (name, *_ALSO.get(name, ())):
        if key in state:
            return state[key]
    there = ", ".join(repr(key) for key in list(state)[:20])
    raise StateDictIOError(f"{path}: has no {name!r} to restore; its keys are {there}")
