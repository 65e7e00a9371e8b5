"""What a worker of `benchmarks.directories` does: save one step after the other and keep the last few, or find the
newest of many."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import statedict_io as sio

KEEP_LAST = 3
NUM_TENSORS = 16


def start(name: str) -> Keeper:
    return KEEPERS[name]()


class Keeper:
    """Has one directory at a time."""

    def __init__(self) -> None:
        self.about: dict[str, str] = {}
        self.state: dict[str, Any] = {}
        self.durable = True

    def begin(self, path: str) -> None:
        """Another directory, which is not there yet."""
        raise NotImplementedError

    def save(self, step: int) -> None:
        raise NotImplementedError

    def wait(self) -> None:
        """For what a save does later, in a thread."""

    def find(self, path: str) -> str:
        """The newest checkpoint of this directory."""
        raise NotImplementedError

    def do_begin(self, path: str, nbytes: int, durable: bool) -> dict[str, Any]:
        import torch

        self.durable = durable
        self.state = {f"weight{i}": torch.rand(nbytes // NUM_TENSORS // 4) for i in range(NUM_TENSORS)}
        self.begin(path)
        for step in range(KEEP_LAST):  # so that each save that is measured deletes one
            self.save(step)
        return {}

    def do_save(self, number: int) -> dict[str, Any]:
        self.wait()
        os.sync()
        return {"s": seconds(lambda: self.save(KEEP_LAST + number))}

    def do_find(self, path: str) -> dict[str, Any]:
        return {"s": seconds(lambda: self.find(path))}

    def close(self) -> None:
        pass


class ByHand(Keeper):
    """Plain saves, a deletion, and the name that comes last."""

    path = ""

    def begin(self, path: str) -> None:
        self.path = path
        os.makedirs(path)

    def save(self, step: int) -> None:
        sio.save(self.state, self.path_of(step), durable=self.durable)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path_of(step - KEEP_LAST))

    def path_of(self, step: int) -> str:
        return os.path.join(self.path, f"step-{step:08d}.pt")

    def find(self, path: str) -> str:
        return max(name for name in os.listdir(path) if name.endswith(".pt"))


class Directory(Keeper):
    ckpts: sio.CheckpointDirectory | None = None

    def begin(self, path: str) -> None:
        self.close()
        self.ckpts = sio.CheckpointDirectory(path, keep_last=KEEP_LAST)

    def save(self, step: int) -> None:
        assert self.ckpts is not None
        self.ckpts.save(self.state, step, 0.5, durable=self.durable)

    def wait(self) -> None:
        assert self.ckpts is not None
        self.ckpts.wait()

    def find(self, path: str) -> str:
        found = sio.CheckpointDirectory(path, keep_last=KEEP_LAST).latest(verify=False)
        assert found is not None
        return found.path

    def close(self) -> None:
        if self.ckpts is not None:
            self.ckpts.close()


KEEPERS: dict[str, type[Keeper]] = {"by hand": ByHand, "statedict_io.CheckpointDirectory": Directory}


def seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin
