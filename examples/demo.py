"""Trains a small model, saves it with torch.save and with statedict_io, and compares bytes and times: `make demo`.

Exit status 0: the files are equal byte for byte and load back to the same model; 1: they are not."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import statedict_io as sio

ROUNDS = 5


def two_moons(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two interleaved half circles with noise: not separable by a line, learnable in seconds."""
    draw = torch.Generator().manual_seed(seed)
    angle = torch.rand(count, generator=draw) * math.pi
    which = torch.randint(0, 2, (count,), generator=draw)
    x = torch.where(which == 0, torch.cos(angle), 1 - torch.cos(angle))
    y = torch.where(which == 0, torch.sin(angle), 0.5 - torch.sin(angle))
    points = torch.stack([x, y], dim=1) + 0.1 * torch.randn(count, 2, generator=draw)
    return points, which


def train() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    points, labels = two_moons(2_000, seed=1)
    print("training an MLP on two moons with AdamW")
    for step in range(201):
        loss = nn.functional.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"  step {step:3d}  loss {loss.item():.4f}")
    points, labels = two_moons(2_000, seed=2)
    with torch.no_grad():
        accuracy = (model(points).argmax(1) == labels).float().mean().item()
    print(f"  accuracy on unseen points {accuracy:.1%}")
    return model


def wide_model(mebibytes: int) -> nn.Module:
    """Layers of 64 MiB each, so that a save takes long enough to be timed."""
    layers = max(1, mebibytes // 64)
    return nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(layers)))


def torch_save(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def torch_save_fsync(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sio_save(model: nn.Module, path: Path) -> None:
    sio.fastsave(model, path)


def sio_save_no_flush(model: nn.Module, path: Path) -> None:
    sio.fastsave(model, path, durable=False)


CONTENDERS: dict[str, Callable[[nn.Module, Path], None]] = {
    "torch.save": torch_save,
    "statedict_io.fastsave, durable=False": sio_save_no_flush,
    "torch.save + fsync": torch_save_fsync,
    "statedict_io.fastsave": sio_save,
}
RIVALS = {
    "statedict_io.fastsave, durable=False": "torch.save",
    "statedict_io.fastsave": "torch.save + fsync",
}
MEANING = {
    "torch.save": "in the kernel's cache",
    "statedict_io.fastsave, durable=False": "in the kernel's cache, replaced atomically",
    "torch.save + fsync": "bytes on the device",
    "statedict_io.fastsave": "bytes and name on the device, replaced atomically",
}


def touch_free_memory(nbytes: int) -> None:
    """On a virtual machine that lends free memory to its host, filling the page cache can take ten times as long, by
    chance. Taking and returning that much memory first makes the figures those of the savers."""
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory[::4096] = bytes(len(range(0, nbytes, 4096)))


def timed_rounds(model: nn.Module, nbytes: int, directory: Path) -> dict[str, float]:
    """Median seconds. Interleaved, after one round that is not counted; every save starts with clean pages."""
    samples: dict[str, list[float]] = {label: [] for label in CONTENDERS}
    for round_number in range(ROUNDS + 1):
        for number, (label, save) in enumerate(CONTENDERS.items()):
            path = directory / str(number) / "model.pt"  # the same file name: it is part of the format
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            os.sync()
            touch_free_memory(nbytes * 5 // 4)
            start = time.perf_counter()
            save(model, path)
            if round_number:
                samples[label].append(time.perf_counter() - start)
    return {label: statistics.median(times) for label, times in samples.items()}


def compare(name: str, model: nn.Module, inputs: torch.Tensor, directory: Path) -> bool:
    nbytes = sum(p.nbytes for p in model.parameters())
    print(f"\n{name}: {nbytes / 2**20:.3g} MiB of parameters, medians of {ROUNDS} interleaved rounds")
    medians = timed_rounds(model, nbytes, directory)
    for label, seconds in medians.items():
        rival = RIVALS.get(label)
        speed = f"{nbytes / seconds / 1e9:5.2f} GB/s" if nbytes > 1 << 20 else " " * 10
        ratio = f"  {medians[rival] / seconds:.2f}x {rival}" if rival else ""
        print(f"  {label:38s} {seconds * 1e3:9.2f} ms  {speed}  on return: {MEANING[label]}{ratio}")

    digests = {}
    for number, label in enumerate(CONTENDERS):
        with open(directory / str(number) / "model.pt", "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        digests[label] = digest.hexdigest()
    for label in ("torch.save", "statedict_io.fastsave"):
        print(f"  sha256 {digests[label]}  {label}")
    same_bytes = len(set(digests.values())) == 1

    with torch.no_grad():
        before = model(inputs)
        ours = directory / str(list(CONTENDERS).index("statedict_io.fastsave")) / "model.pt"
        model.load_state_dict(torch.load(ours, weights_only=True))
        same_outputs = torch.equal(before, model(inputs))
    print(f"  all {len(digests)} files equal byte for byte: {'yes' if same_bytes else 'NO'}")
    print(f"  torch.load of our file gives the same outputs, bit for bit: {'yes' if same_outputs else 'NO'}")
    return same_bytes and same_outputs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="where to save; its disk is what is timed")
    parser.add_argument("--mebibytes", type=int, default=256, help="parameters of the larger model")
    options = parser.parse_args()
    info = sio.backend_info()
    print(f"statedict_io saves with its {info.name} backend: {info.reason}")
    print(f"torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory(prefix="statedict-io-demo-", dir=options.dir) as directory:
        trained = train()
        points, _ = two_moons(100, seed=3)
        good = compare("the trained model", trained, points, Path(directory))
        wide = wide_model(options.mebibytes)
        good &= compare("a wider model", wide, torch.randn(4, 4096), Path(directory))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
