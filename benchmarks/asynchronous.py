"""What asynchronous saves cost the one who calls: `python -m benchmarks.asynchronous --out results.json`.

Two parts. The stall: how long the call takes, against one warm parallel memcpy of the same bytes. The training loop:
steps per second of a real one that saves its checkpoint (model and AdamW's state) every so many steps. In both the
contenders take turns in one process, so a change in the machine's mood hits all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import program, results
from .cases import MIB, build, format_size, tensors_in
from .measure import synchronize_device
from .turns import rounds

PIECE_NBYTES = 8 * MIB


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    document = program.document(options, threads=torch.get_num_threads())
    with program.scratch(options.dir) as directory:
        if "stall" in options.parts:
            document["stall"] = measure_stall(options, directory)
        if "training" in options.parts:
            document["training"] = measure_training(options, directory)
    program.write(document, options)
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
    samples: dict[str, list[dict[str, float]]] = {key: [] for key in ["parallel memcpy", *contenders]}
    for _, order, _ in rounds(list(samples), options.rounds, options.seconds):
        for key in order:
            if key == "parallel memcpy":
                samples[key].append({"call_s": timed(copy)})
                continue
            settle(options.device)
            start = time.perf_counter()
            wait = contenders[key](case.state, directory / "model.pt")
            called = time.perf_counter() - start
            wait()
            samples[key].append({"call_s": called, "until_end_s": time.perf_counter() - start})
    rows = {key: results.measured(of) for key, of in samples.items()}
    reference = rows["parallel memcpy"]["median"]["call_s"]
    print(f"the call's time, {format_size(case.payload_nbytes)} on {options.device}: medians, first")
    for key, row in rows.items():
        median, first = row["median"]["call_s"], row["first"]["call_s"]
        print(f"  {key:44} {median * 1e3:8.1f} ms  {median / reference:6.2f} x memcpy   first {first * 1e3:8.1f} ms")
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
            synchronize_device(device)

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
    synchronize_device(device)


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
    rates: dict[str, list[dict[str, float]]] = {key: [] for key in contenders}
    keys = list(contenders)
    for number, order, _ in rounds(keys, options.training_rounds, options.seconds):  # the first pays for buffers
        for key in order:
            settle(options.device)
            start = time.perf_counter()
            wait: Wait = lambda: None  # noqa: E731
            for i in range(options.steps):
                step()
                if i % options.every == 0:
                    wait()  # for the last one; by then it has long ended
                    wait = contenders[key](state(), directory / f"{keys.index(key)}.pt")
            wait()
            synchronize_device(options.device)
            rate = options.steps / (time.perf_counter() - start)
            rates[key].append({"steps_per_second": rate})
            print(f"  round {number}: {key}: {rate:.3f} steps/s", file=sys.stderr, flush=True)
    rows = {key: results.measured(of) for key, of in rates.items()}
    reference = rows["no checkpoints"]["median"]["steps_per_second"]
    print(
        f"steps per second, {parameters / 1e6:.0f} M parameters, {format_size(nbytes)} every {options.every} steps: "
        f"median of {rows[keys[0]]['rounds']} times {options.steps} steps"
    )
    for key, row in rows.items():
        median = row["median"]["steps_per_second"]
        print(f"  {key:44} {median:8.3f}   {median / reference:6.3f} of none")
    return {
        "parameters": parameters,
        "checkpoint_bytes": nbytes,
        "steps": options.steps,
        "checkpoint_every": options.every,
        "batch": options.batch,
        "torch": torch.__version__,
        "contenders": rows,
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
    parser = program.Program("asynchronous", __doc__, rounds=7)
    parser.add_device()
    parser.add_argument("--parts", nargs="+", choices=["stall", "training"], default=["stall", "training"])
    parser.add_argument("--parameters", type=int, default=110_000_000, help="of the model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="of one contender's turn")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--training-rounds", type=int, default=3, help="turns of each contender, after the first")
    return parser.options(arguments, size=8 * MIB, parameters=100_000, batch=4, steps=4, every=2, training_rounds=1)


if __name__ == "__main__":
    sys.exit(main())
