"""The limits: the payload's bytes moved with no format, pickle or checksum. Nothing that saves can beat these."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, ClassVar

from .base import Contender, StateDict, Unsupported, cuda_missing

ROOT = Path(__file__).resolve().parents[2]
CHUNK_NBYTES = 8 << 20
SOURCE_LIMIT_NBYTES = 1 << 30


def build_raw(name: str) -> Path:
    """The compiled `name` of benchmarks/raw, built at first use; named for its source, so an edit builds anew."""
    source = ROOT / "benchmarks" / "raw" / f"{name}.cpp"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    binary = ROOT / "build" / "benchmarks" / f"{name}-{digest}"
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        fresh = binary.with_name(f"{binary.name}.{os.getpid()}")
        subprocess.run(["g++", "-std=c++17", "-O2", "-pthread", "-Wall", str(source), "-o", str(fresh)], check=True)
        os.replace(fresh, binary)  # several workers may build at once
    return binary


class RawServer:
    """A raw program that takes a path a line and answers with a JSON object; it keeps its buffers, as libraries do."""

    def __init__(self, name: str, *options: str) -> None:
        self._process = subprocess.Popen(
            [str(build_raw(name)), *options, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        self._answer()  # buffers are filled

    def order(self, path: Path | str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait(timeout=30)}")
        answer: dict[str, Any] = json.loads(line)
        if "unsupported" in answer:
            raise Unsupported(answer["unsupported"])
        if "error" in answer:
            raise OSError(answer["error"])
        return answer


class RawWrite(Contender):
    kind = "raw"
    needs_state = False
    options: ClassVar[tuple[str, ...]]
    _server: RawServer | None = None

    @classmethod
    def available(cls, op: str = "save") -> str | None:
        if op != "save":
            return "raw limits are about saving"
        return None if shutil.which("g++") else "no g++ to compile raw_write.cpp"

    def prepare(self, payload_nbytes: int) -> None:
        super().prepare(payload_nbytes)
        self.close()
        size = ["--size", str(payload_nbytes), "--chunk", str(CHUNK_NBYTES), *self.more_options(payload_nbytes)]
        self._server = RawServer("raw_write", *self.options, *size)

    def more_options(self, payload_nbytes: int) -> list[str]:
        return []

    def save(self, state_dict: StateDict, path: Path) -> None:
        assert self._server is not None
        self._server.order(path)

    def processes(self) -> list[int]:
        return [self._server.pid] if self._server is not None else []

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


class RawBuffered(RawWrite):
    """Its source is as large as the payload (to 1 GiB), so that it streams from memory, not from the CPU's cache."""

    key = "raw_buffered"
    label = "raw: one thread, buffered, preallocated"
    options = ("--buffered", "--threads", "1")

    def more_options(self, payload_nbytes: int) -> list[str]:
        return ["--source", str(min(payload_nbytes, SOURCE_LIMIT_NBYTES))]


class RawDirect(RawWrite):
    key = "raw_direct"
    label = "raw: O_DIRECT, 4 writers, preallocated"
    durable = True
    options = ("--direct", "--threads", "4", "--fsync", "--fsync-directory")


class RawTmpfs(RawBuffered):
    """The same bytes into /dev/shm whatever --dir is: what memory alone allows."""

    key = "raw_tmpfs"
    label = "raw: buffered, into tmpfs"
    durable = True  # as far as tmpfs goes
    writes_file = False

    @classmethod
    def available(cls, op: str = "save") -> str | None:
        return super().available(op) or (None if os.access("/dev/shm", os.W_OK) else "no /dev/shm")

    def save(self, state_dict: StateDict, path: Path) -> None:
        super().save(state_dict, self._inside)

    def prepare(self, payload_nbytes: int) -> None:
        if shutil.disk_usage("/dev/shm").free < payload_nbytes * 2:
            raise Unsupported("/dev/shm is too small")
        super().prepare(payload_nbytes)

    def remove(self, path: Path) -> None:
        self._inside.unlink(missing_ok=True)

    @property
    def _inside(self) -> Path:
        return Path("/dev/shm") / f"statedict-io-raw-{os.getpid()}"


class RawPinnedCopy(Contender):
    """Device memory into one reused pinned buffer, nothing written: what the bus allows."""

    key = "raw_pinned"
    label = "raw: device to pinned memory, no file"
    kind = "raw"
    durable = True
    needs_state = False
    device_only = True
    writes_file = False
    buffer_nbytes = 256 << 20

    @classmethod
    def available(cls, op: str = "save") -> str | None:
        return "raw limits are about saving" if op != "save" else cuda_missing()

    def prepare(self, payload_nbytes: int) -> None:
        import torch

        super().prepare(payload_nbytes)
        size = max(1, min(payload_nbytes, self.buffer_nbytes))
        self._source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._pinned.copy_(self._source)

    def save(self, state_dict: StateDict, path: Path) -> None:
        import torch

        left = self.payload_nbytes
        while left > 0:
            size = min(left, self._pinned.numel())
            self._pinned[:size].copy_(self._source[:size], non_blocking=True)
            left -= size
        torch.cuda.synchronize()
