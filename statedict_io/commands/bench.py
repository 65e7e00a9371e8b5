"""``statedict-io bench``: the user's short version of the project's benchmarks.

Each contender has a process of its own, which builds the state dict from random bits once; then they save in turn,
round by round, so that what else the machine does
hits all alike.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..installed.stock import torch_save
from ..system.descriptors import descriptor_of, sync
from ..untrusted.escaping import escaped
from ..writing.saving import save

_TENSOR_NBYTES = 32 << 20


@dataclass
class Samples:
    label: str
    until_return: list[float] = field(default_factory=list)  #: seconds
    until_durable: list[float] = field(default_factory=list)  #: seconds


def _without_crc(obj: Any, path: str) -> None:
    torch.serialization.set_crc32_options(False)
    torch_save(obj, path)


CONTENDERS: dict[str, Callable[[Any, str], object]] = {
    "torch.save": torch_save,
    "torch.save, CRC off": _without_crc,
    "statedict_io": save,
    "statedict_io, durable=False": lambda obj, path: save(obj, path, durable=False),
}


def run(nbytes: int, device: str, directory: str, rounds: int, plot: str | None) -> list[Samples]:
    """Measures, prints a table and, if ``plot`` is a path, draws it.

    Args:
        nbytes: of tensor data.
        device: of the tensors, as torch names it.
        directory: an existing one; files are written below it and removed.
        rounds: measured ones; one more comes first and is dropped.

    Raises:
        ImportError: rich or matplotlib is missing; says what to install.
    """
    console = _rich_console()
    if plot is not None:
        _matplotlib()
    results = [Samples(label) for label in CONTENDERS]
    with tempfile.TemporaryDirectory(dir=directory, prefix="statedict-io-bench-") as scratch:
        workers = [
            _Worker(label, nbytes, device, os.path.join(scratch, f"{i}.pt")) for i, label in enumerate(CONTENDERS)
        ]
        try:
            for round_number in range(rounds + 1):
                for worker, samples in zip(workers, results, strict=True):
                    until_return, until_durable = worker.save()
                    if round_number > 0:
                        samples.until_return.append(until_return)
                        samples.until_durable.append(until_durable)
        finally:
            for worker in workers:
                worker.stop()
    _print_table(console, results, nbytes, device, directory)
    if plot is not None:
        _draw(results, nbytes, plot)
    return results


class _Worker:
    def __init__(self, label: str, nbytes: int, device: str, path: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, label, nbytes, device, path), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()  # ready

    def save(self) -> tuple[float, float]:
        self._connection.send("save")
        return self._answer()

    def stop(self) -> None:
        self._connection.close()
        self._process.join()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise OSError(f"a benchmark process ended unexpectedly (exit code {self._process.exitcode})") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(connection: Connection, label: str, nbytes: int, device: str, path: str) -> None:
    try:
        state_dict = _random_state_dict(nbytes, device)
        connection.send(None)
        while True:
            connection.recv()
            connection.send(_time_one(CONTENDERS[label], state_dict, path))
    except EOFError:
        pass
    except Exception as e:
        connection.send(e)


def _time_one(save_to: Callable[[Any, str], object], state_dict: Any, path: str) -> tuple[float, float]:
    if os.path.exists(path):
        os.unlink(path)
    if hasattr(os, "sync"):
        os.sync()  # the last contender's dirty pages are not this one's to write
    start = time.perf_counter()
    save_to(state_dict, path)
    returned = time.perf_counter()
    with descriptor_of(path, os.O_RDWR) as fd:
        sync(fd)
    return returned - start, time.perf_counter() - start


def _random_state_dict(nbytes: int, device: str) -> dict[str, torch.Tensor]:
    sizes = [_TENSOR_NBYTES] * (nbytes // _TENSOR_NBYTES) + [nbytes % _TENSOR_NBYTES // 8 * 8]
    return {
        f"layers.{i}.weight": torch.randint(-(2**63), 2**63 - 1, (size // 8,)).view(torch.bfloat16).to(device)
        for i, size in enumerate(sizes)
        if size
    }


def _rich_console() -> Any:
    try:
        from rich.console import Console
    except ImportError:
        raise ImportError("bench needs rich: pip install 'statedict-io[cli]'") from None
    return Console()


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install 'statedict-io[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _print_table(console: Any, results: list[Samples], nbytes: int, device: str, directory: str) -> None:
    from rich.table import Table
    from rich.text import Text

    rounds = len(results[0].until_return)
    where = escaped(os.path.abspath(directory), sys.stdout.encoding)
    title = f"{nbytes / 2**20:,.0f} MiB on {device} to {where}, medians of {rounds}"
    note = "x: how many times as fast as torch.save"
    table = Table(title=Text(title), caption=Text(note))
    table.add_column("", no_wrap=True)
    for column in ("returns", "x", "on the disk", "x", "GB/s"):
        table.add_column(column, justify="right")
    reference = results[0]
    for samples in results:
        returned, durable = statistics.median(samples.until_return), statistics.median(samples.until_durable)
        table.add_row(
            samples.label,
            f"{returned * 1e3:,.1f} ms",
            f"{statistics.median(reference.until_return) / returned:.2f}",
            f"{durable * 1e3:,.1f} ms",
            f"{statistics.median(reference.until_durable) / durable:.2f}",
            f"{nbytes / 1e9 / durable:.2f}",
        )
    console.print(table)


def _draw(results: list[Samples], nbytes: int, path: str) -> None:
    pyplot = _matplotlib()
    figure, axes = pyplot.subplots(figsize=(8, 3))
    positions = range(len(results))
    for offset, name in ((0.2, "until_return"), (-0.2, "until_durable")):
        speeds = [nbytes / 1e9 / statistics.median(getattr(samples, name)) for samples in results]
        axes.barh([p + offset for p in positions], speeds, height=0.4, label=name.replace("_", " "))
    axes.set_yticks(list(positions), [samples.label for samples in results])
    axes.invert_yaxis()
    axes.set_xlabel("GB/s")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
