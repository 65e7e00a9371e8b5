"""What asynchronous saves cost the one who calls: `python -m benchmarks.asynchronous --out results.json`.

Two parts. The stall: how long the call takes, against one warm parallel memcpy of the same bytes. The training loop:
steps per second of a real one that saves its checkpoint (model and AdamW's state) every so many steps. In both the
contenders take turns in one process, so a change in the machine's mood hits all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import environment
from .cases import GIB, MIB, build, format_size, parse_size, tensors_in
from .turns import in_turn

PIECE_NBYTES = 8 * MIB


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    directory = Path(tempfile.mkdtemp(prefix="statedict-io-bench-", dir=options.dir))
    document = environment.describe(directory, options.device)
    document["settings"] = {
        "command": ["python", "-m", "benchmarks.asynchronous", *(sys.argv[1:] if arguments is None else arguments)],
        "threads": torch.get_num_threads(),
    }
    try:
        if "stall" in options.parts:
            document["stall"] = measure_stall(options, directory)
        if "training" in options.parts:
            document["training"] = measure_training(options, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1))
    return 0


# ---- contenders: each starts a save and returns a function that waits for its end


Wait = Callable[[], Any]


def save_async(state: Any, path: Path) -> Wait:
    import statedict_io as sio

    return sio.save_async(state, path).result


def save_async_fallback(state: Any, path: Path) -> Wait:
    import statedict_io as sio

    return sio.save_async(state, path, backend="torch").result


def torch_save(state: Any, path: Path) -> Wait:
    import torch

    torch.save(state, path)
    return lambda: None


def dcp_async_save(state: Any, path: Path) -> Wait:
    import torch.distributed.checkpoint as dcp

    saving: Any = dcp.async_save(state, checkpoint_id=path.with_suffix(".dcp"), no_dist=True)
    return saving.result


def no_save(state: Any, path: Path) -> Wait:
    del state, path
    return lambda: None


# ---- the stall


def measure_stall(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    case = build("llama", options.size, options.device)
    contenders: dict[str, Callable[[Any, Path], Wait]] = {
        "statedict_io.save_async": save_async,
        "statedict_io.save_async, Python backend": save_async_fallback,
        "torch.save": torch_save,
        "torch.distributed.checkpoint.async_save": dcp_async_save,
    }
    copy = reference_copy(case.state, options.device)
    samples: dict[str, list[float]] = {key: [] for key in ["parallel memcpy", *contenders]}
    ends: dict[str, list[float]] = {key: [] for key in contenders}
    for number in range(options.rounds + 1):
        for key in in_turn(list(samples), number):
            if key == "parallel memcpy":
                samples[key].append(timed(copy))
                continue
            settle(options.device)
            start = time.perf_counter()
            wait = contenders[key](case.state, directory / "model.pt")
            samples[key].append(time.perf_counter() - start)
            wait()
            ends[key].append(time.perf_counter() - start)
    reference = statistics.median(samples["parallel memcpy"][1:])
    print(f"the call's time, {format_size(case.payload_nbytes)} on {options.device}: median of {options.rounds}, first")
    rows = {}
    for key, seconds in samples.items():
        rows[key] = {"first_s": seconds[0], "call_s": seconds[1:], "until_end_s": ends.get(key, [])}
        median = statistics.median(seconds[1:])
        print(
            f"  {key:44} {median * 1e3:8.1f} ms  {median / reference:6.2f} x memcpy   first {seconds[0] * 1e3:8.1f} ms"
        )
    return {"payload_bytes": case.payload_nbytes, "device": options.device, "contenders": rows}


def reference_copy(state: Any, device: str) -> Callable[[], Any]:
    """One copy of the state's bytes into memory that is there already, in as many threads as there are cores."""
    import torch

    tensors = list(tensors_in(state))
    if device != "cpu":
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]

        def copy_from_device() -> None:
            for to, source in zip(copies, tensors, strict=True):
                to.copy_(source, non_blocking=True)
            synchronize(device)

        copy_from_device()
        return copy_from_device
    copies = [torch.empty_like(t).fill_(1) for t in tensors]
    pieces = [
        (to.data_ptr() + at, source.data_ptr() + at, min(PIECE_NBYTES, source.nbytes - at))
        for to, source in zip(copies, tensors, strict=True)
        for at in range(0, source.nbytes, PIECE_NBYTES)
    ]

    def copy() -> None:
        parallel_memcpy(iter(pieces))
        assert copies  # they own the memory

    copy()
    return copy


def parallel_memcpy(pieces: Iterator[tuple[int, int, int]]) -> None:
    taking = threading.Lock()

    def work() -> None:
        while True:
            with taking:
                piece = next(pieces, None)
            if piece is None:
                return
            ctypes.memmove(*piece)  # without the GIL

    threads = [threading.Thread(target=work) for _ in range(len(os.sched_getaffinity(0)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def settle(device: str) -> None:
    """What the last one left dirty or queued is not the next one's to pay for."""
    os.sync()
    synchronize(device)


def synchronize(device: str) -> None:
    import torch

    if device != "cpu":
        torch.accelerator.synchronize()


# ---- the training loop


def measure_training(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    import torch

    step, state, parameters = training_loop(options.parameters, options.batch, options.device)
    contenders: dict[str, Callable[[Any, Path], Wait]] = {
        "no checkpoints": no_save,
        "statedict_io.save_async": save_async,
        "torch.save": torch_save,
        "torch.distributed.checkpoint.async_save": dcp_async_save,
    }
    for _ in range(2):
        step()
    nbytes = sum(t.untyped_storage().nbytes() for t in tensors_in(state()))
    rates: dict[str, list[float]] = {key: [] for key in contenders}
    keys = list(contenders)
    began = time.monotonic()
    for number in range(options.training_rounds + 1):  # the first pays for buffers
        if number > 1 and time.monotonic() - began > options.seconds:
            break
        for key in in_turn(keys, number):
            settle(options.device)
            start = time.perf_counter()
            wait: Wait = lambda: None  # noqa: E731
            for i in range(options.steps):
                step()
                if i % options.every == 0:
                    wait()  # for the last one; by then it has long ended
                    wait = contenders[key](state(), directory / f"{keys.index(key)}.pt")
            wait()
            synchronize(options.device)
            rates[key].append(options.steps / (time.perf_counter() - start))
            print(f"  round {number}: {key}: {rates[key][-1]:.3f} steps/s", file=sys.stderr, flush=True)
    reference = statistics.median(rates["no checkpoints"][1:])
    print(
        f"steps per second, {parameters / 1e6:.0f} M parameters, {format_size(nbytes)} every {options.every} steps: "
        f"median of {len(rates[keys[0]]) - 1} times {options.steps} steps"
    )
    for key, samples in rates.items():
        median = statistics.median(samples[1:])
        print(f"  {key:44} {median:8.3f}   {median / reference:6.3f} of none")
    return {
        "parameters": parameters,
        "checkpoint_bytes": nbytes,
        "steps": options.steps,
        "checkpoint_every": options.every,
        "batch": options.batch,
        "torch": torch.__version__,
        "contenders": {key: {"first": r[0], "steps_per_second": r[1:]} for key, r in rates.items()},
    }


def training_loop(parameters: int, batch: int, device: str) -> tuple[Callable[[], None], Callable[[], Any], int]:
    """(one optimizer step, the state to save, the number of parameters): an MLP of square layers with AdamW."""
    import torch
    from torch import nn

    layers = 8
    width = max(8, round((parameters / layers) ** 0.5))
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for _ in range(layers):
        blocks += [nn.Linear(width, width), nn.GELU()]
    model = nn.Sequential(*blocks).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs = torch.randn(batch, width, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = (model(inputs) - inputs).square().mean()
        loss.backward()
        optimizer.step()

    def state() -> Any:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    return step, state, sum(p.numel() for p in model.parameters())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.asynchronous", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=["stall", "training"], default=["stall", "training"])
    parser.add_argument("--size", type=parse_size, default=GIB, help="payload of the stall's state")
    parser.add_argument("--rounds", type=int, default=7, help="of the stall, after the first")
    parser.add_argument("--parameters", type=int, default=110_000_000, help="of the model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="of one contender's turn")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--training-rounds", type=int, default=3, help="turns of each contender, after the first")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no new round of training after that long"
    )
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="where to save; its file system is measured")
    parser.add_argument("--device", default="cpu", help="where tensors and training are: cpu, cuda, ...")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    parser.add_argument("--smoke", action="store_true", help="tiny, one round: does everything run?")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.size, options.rounds, options.parameters = 8 * MIB, 1, 100_000
        options.batch, options.steps, options.every, options.training_rounds = 4, 4, 2, 1
    return options


if __name__ == "__main__":
    sys.exit(main())
