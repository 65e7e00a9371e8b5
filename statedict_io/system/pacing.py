"""Keeps a writer below a number of bytes per second; the extension has its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class WritePace:
    """Use from one thread.

    Args:
        bytes_per_second: None: no limit.
    """

    def __init__(self, bytes_per_second: float | None) -> None:
        self._bytes_per_second = bytes_per_second
        self._next = time.monotonic()

    def wait_for(self, nbytes: int) -> None:
        """Returns when ``nbytes`` more may be written."""
        if self._bytes_per_second is None:
            return
        now = time.monotonic()
        self._next = max(self._next, now) + nbytes / self._bytes_per_second
        time.sleep(self._next - now)


def paced(write: Callable[[memoryview], Any], bytes_per_second: float | None) -> Callable[[memoryview], Any]:
    """``write``, no faster than that."""
    if bytes_per_second is None:
        return write
    pace = WritePace(bytes_per_second)

    def write_slowly(data: memoryview) -> Any:
        pace.wait_for(len(data))
        return write(data)

    return write_slowly
