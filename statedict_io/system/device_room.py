"""Whether devices have memory to spare for a snapshot."""

from __future__ import annotations

from collections.abc import Callable

import torch

_DEFAULT_MARGIN_SHARE = 16
#: Of each device, bytes that snapshots had and gave back: they stay with torch's allocator, and the driver does not
#: count them as free.
_given_back: dict[str, int] = {}


class DeviceRoom:
    """
    Args:
        max_nbytes: of each device's memory for all snapshots; None: what is free.
        margin_nbytes: of each device's memory that stays free; None: a sixteenth of it.
    """

    def __init__(self, max_nbytes: int | None, margin_nbytes: int | None) -> None:
        self._max_nbytes = max_nbytes
        self._margin_nbytes = margin_nbytes

    def is_there_for(self, nbytes_of: dict[str, int], in_use: Callable[[str], int]) -> bool:
        """Whether every device has room for so many bytes more than the snapshots that are ``in_use`` there."""
        return all(self._has_room(device, nbytes, in_use(device)) for device, nbytes in nbytes_of.items())

    def _has_room(self, device: str, nbytes: int, in_use: int) -> bool:
        if self._max_nbytes is not None and in_use + nbytes > self._max_nbytes:
            return False
        free, total = _free_and_total(device)
        margin = total // _DEFAULT_MARGIN_SHARE if self._margin_nbytes is None else self._margin_nbytes
        had = _given_back.get(device, 0)
        free += min(max(had - in_use, 0), _cached_nbytes(device))
        if nbytes > free - margin:
            return False
        _given_back[device] = max(had, in_use + nbytes)
        return True


def _free_and_total(device: str) -> tuple[int, int]:
    """(0, 0) where nobody can say."""
    module = torch.get_device_module(torch.device(device).type)
    get = getattr(module, "mem_get_info", None)
    if get is None:
        return 0, 0
    free, total = get(torch.device(device))
    return int(free), int(total)


def _cached_nbytes(device: str) -> int:
    """What torch's allocator holds and nobody uses."""
    module = torch.get_device_module(torch.device(device).type)
    try:
        return int(module.memory_reserved(torch.device(device)) - module.memory_allocated(torch.device(device)))
    except AttributeError:
        return 0
