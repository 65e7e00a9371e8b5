"""The command line: ``statedict-io`` and ``python -m statedict_io``."""

from __future__ import annotations

import argparse
import re
import sys

from . import backend_info, benchmark

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="statedict-io", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="say which backend is active and why")
    info.set_defaults(run=lambda _: print(backend_info()))

    bench = commands.add_parser("bench", help="time torch.save and statedict_io here, side by side")
    bench.add_argument(
        "--size", type=_nbytes, default=_nbytes("1GiB"), help="of the state dict, such as 512MiB (default 1GiB)"
    )
    bench.add_argument("--device", default="cpu", help="where the tensors are (default cpu)")
    bench.add_argument("--dir", default=".", help="where the files go: measures that file system (default .)")
    bench.add_argument("--rounds", type=int, default=5, help="measured rounds, after one warm-up (default 5)")
    bench.add_argument("--plot", metavar="OUT.png", help="also draw the result")
    bench.set_defaults(run=lambda a: benchmark.run(a.size, a.device, a.dir, a.rounds, a.plot))

    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ImportError, OSError) as e:
        print(f"statedict-io: {e}", file=sys.stderr)
        return 2
    return 0


def _nbytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"not a size: {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


if __name__ == "__main__":
    sys.exit(main())
