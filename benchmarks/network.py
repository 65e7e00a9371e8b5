"""What the worker of `benchmarks.remote` does that is not measured: a store in memory behind a slow network, both of
tests/remote, in a process of their own."""

from __future__ import annotations

import mmap
import sys
import time
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from remote.memory_server import MemoryServer
from remote.memory_store import MemoryStore
from remote.network import Network

BUCKET = "bench"


def start(name: str) -> Store:
    return Store()


class Store:
    def __init__(self) -> None:
        self._store = MemoryStore(verify=False)
        self._server = MemoryServer(self._store)
        self._network = Network(self._server.address, latency=0.0)
        self._store.put(BUCKET, "empty", memoryview(b""))
        self._cpu_s = 0.0
        self.about = {"url": self._network.url}

    def do_limit(self, latency: float, rate: float | None, total_rate: float | None = None) -> dict[str, Any]:
        self._network.latency, self._network.rate, self._network.total_rate = latency, rate, total_rate
        return {}

    def do_reset(self) -> dict[str, Any]:
        self._network.reset()
        self._cpu_s = time.process_time()
        return {}

    def do_traffic(self) -> dict[str, Any]:
        return {**self._network.traffic.summary(), "store_cpu_s": time.process_time() - self._cpu_s}

    def do_put(self, path: str, key: str) -> dict[str, Any]:
        """A file becomes an object."""
        with open(path, "rb") as file:
            self._store.put(BUCKET, key, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        return {}

    def do_describe(self, key: str) -> dict[str, Any]:
        """Size and CRC-32 of an object, and how many uploads were left open."""
        found = self._store.object(BUCKET, key)
        crc = 0
        for part in found.parts if found else ():
            crc = zlib.crc32(part, crc)
        return {"nbytes": found.nbytes if found else 0, "crc32": crc, "uploads": self._store.uploads}

    def do_remove(self, key: str) -> dict[str, Any]:
        self._store.remove(BUCKET, key)
        return {}

    def close(self) -> None:
        self._network.stop()
        self._server.stop()
