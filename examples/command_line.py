"""The options that the examples of training have in common, and the last line that they print."""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

from torch import nn


def parse(arguments: list[str] | None, description: str | None, **defaults: Any) -> argparse.Namespace:
    """``--die-at-step``, and an option for each of ``defaults``; of a list one is chosen, the first by default.

    ``arguments``: those of the process if ``None``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--die-at-step", type=int)
    for name, default in defaults.items():
        option = "--" + name.replace("_", "-")
        if isinstance(default, list):
            parser.add_argument(option, choices=default, default=default[0])
        else:
            parser.add_argument(option, type=type(default), default=default)
    return parser.parse_args(arguments)


def print_weights(model: nn.Module) -> None:
    """Equal digests: equal weights, bit for bit."""
    weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    print(f"weights {hashlib.sha256(weights).hexdigest()}")
