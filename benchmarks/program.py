"""What the programs of this folder have in common: options, a directory to measure in, the document that they write."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import environment
from .cases import GIB, parse_size
from .processes import checkout


class Program(argparse.ArgumentParser):
    """`python -m benchmarks.{name}`."""

    def __init__(self, name: str, about: str | None, *, rounds: int, seconds: float = math.inf) -> None:
        super().__init__(f"python -m benchmarks.{name}", description=about)
        self.add_argument("--size", type=parse_size, default=GIB, help="payload; of several the largest")
        self.add_argument("--rounds", type=int, default=rounds, help="timed rounds after the first")
        self.add_argument("--seconds", type=float, default=seconds, help="start no new round after that long")
        self.add_argument("--dir", type=Path, default=Path.cwd(), help="where to save; its file system is measured")
        self.add_argument("--out", type=Path, help="write medians and spreads as JSON")
        self.add_argument("--samples", type=Path, help="write the same with every sample")
        self.add_argument("--smoke", action="store_true", help="tiny, one round: does everything run?")

    def add_device(self) -> None:
        self.add_argument("--device", default="cpu", help="where the tensors are: cpu, cuda, ...")

    def add_before(self) -> None:
        self.add_argument(
            "--before",
            type=checkout,
            metavar="DIR",
            help="a checkout of statedict_io, built in place: it takes part beside this one",
        )

    def options(self, arguments: list[str] | None, **of_smoke: Any) -> argparse.Namespace:
        options = self.parse_args(arguments)
        if options.smoke:
            vars(options).update(of_smoke, rounds=1)
        if options.rounds < 1:
            self.error("--rounds must be at least 1")
        if not options.dir.is_dir():
            self.error(f"--dir {options.dir}: no such directory")
        options.dir = options.dir.resolve()
        options.command = [*self.prog.split(), *(sys.argv[1:] if arguments is None else arguments)]
        return options


def document(options: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """Where the figures come from; they are still to come."""
    device = vars(options).get("device", "cpu")
    described = environment.describe(options.dir, device)
    described["settings"] = {"command": options.command, "rounds": options.rounds, "device": device, **settings}
    return described


def write(document: dict[str, Any], options: argparse.Namespace) -> None:
    if options.out is not None:
        options.out.write_text(as_json(without_samples(document)))
    if options.samples is not None:
        options.samples.write_text(as_json(document))


def without_samples(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: without_samples(child) for name, child in tree.items() if name != "samples"}
    return [without_samples(child) for child in tree] if isinstance(tree, list) else tree


def as_json(document: dict[str, Any]) -> str:
    """With lists of plain values on one line."""
    text = json.dumps(document, indent=1)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: "[" + re.sub(r"\n\s*", " ", found[1]) + "]", text) + "\n"


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="statedict-io-bench-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def comma_list(known: list[str]) -> Any:
    def split(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{unknown or 'nothing'}: choose from {', '.join(known)}")
        return names

    return split
