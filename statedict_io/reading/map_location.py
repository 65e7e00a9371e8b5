"""Where ``map_location`` sends storages, as far as it can be told before they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.serialization

from .records import DATA_PKL, StoredRecords


def _is_meta(map_location: Any) -> bool:
    return isinstance(map_location, (str, torch.device)) and str(map_location).partition(":")[0] == "meta"


#: Of the releases that have it, what torch.load itself asks.
is_meta: Callable[[Any], bool] = getattr(torch.serialization, "_is_meta_location", _is_meta)


def stays_on_cpu(map_location: Any, records: StoredRecords) -> bool:
    """Whether storages will stay in host memory; a wrong guess costs memory or speed, nothing else."""
    if isinstance(map_location, (str, torch.device)):
        return str(map_location) == "cpu"
    if not torch.accelerator.is_available():
        return True
    if map_location is not None and not isinstance(map_location, dict):
        return False
    data_pkl = records.read(DATA_PKL) if DATA_PKL in records else b""
    device_types = ("cuda", "xpu", "mps", "hpu", "mtia", torch._C._get_privateuse1_backend_name())
    targets = [] if map_location is None else list(map_location.values())
    return all(str(target) == "cpu" for target in targets) and not any(
        device_type.encode() in data_pkl for device_type in device_types
    )


def saved_from_cpu_stays(map_location: Any) -> bool:
    """The same for storages that were saved from the CPU."""
    if map_location is None or not torch.accelerator.is_available():
        return True
    if isinstance(map_location, dict):
        map_location = map_location.get("cpu", "cpu")
    return isinstance(map_location, (str, torch.device)) and str(map_location) == "cpu"


def only_device(map_location: Any, swaps: Callable[[], bool]) -> torch.device | None:
    """The accelerator that torch will move every storage to, whatever it was saved from; None if it is not so sure.

    ``swaps`` tells whether the file has the other byte order than this machine.
    """
    if not isinstance(map_location, (str, torch.device)) or not torch.accelerator.is_available():
        return None
    try:
        if swaps():  # torch does that before it moves them
            return None
        restore = torch.serialization.default_restore_location
        moved = restore(torch.UntypedStorage(0, device="cpu"), str(map_location))
        leaves_it = restore(moved, str(map_location)) is moved
    except Exception:  # torch will say it
        return None
    accelerator = torch.accelerator.current_accelerator()
    return moved.device if leaves_it and accelerator is not None and moved.device.type == accelerator.type else None
