"""How long other Python threads stand still while somebody works: what the GIL costs them."""

from __future__ import annotations

import threading
import time
from types import TracebackType

PERIOD_SECONDS = 0.001


class Heartbeat:
    """A thread that ticks every millisecond in the block. Afterwards `largest_gap_s` is the longest time between two
    ticks, the one in which the block ended included. A busy machine makes gaps too."""

    def __init__(self) -> None:
        self.largest_gap_s = 0.0
        self._stop = False
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._tick)

    def _tick(self) -> None:
        last = time.perf_counter()
        self._started.set()
        while not self._stop:
            time.sleep(PERIOD_SECONDS)
            now = time.perf_counter()
            self.largest_gap_s = max(self.largest_gap_s, now - last)
            last = now

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop = True
        self._thread.join()
