"""Hands the whole save to the installed ``torch.save``, inside a replacement: the legacy format, and formats that ours
does not reproduce."""

from __future__ import annotations

from typing import Any

import torch

from ..replacement import Replacement
from ..targets import FileTarget, Target


def save(obj: Any, target: Target, *, durable: bool, **torch_options: Any) -> None:
    """Keyword arguments beyond ``durable`` are those of ``torch.save``."""
    if not isinstance(target, FileTarget):
        torch.save(obj, target.given, **torch_options)
        return
    # In a directory of its own the file can have its final name, from which torch takes the archive's.
    with Replacement(target, durable=durable, as_directory=True) as replacement:
        torch.save(obj, replacement.path_inside, **torch_options)
        replacement.commit()
