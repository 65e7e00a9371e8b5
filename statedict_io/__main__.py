"""The command line: ``statedict-io`` and ``python -m statedict_io``."""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from typing import NoReturn

import torch

from .backends.info import backend_info
from .commands import bench, convert, diff, inspect, listing, prune, verify
from .commands.printing import complain, say
from .errors import StateDictIOError
from .untrusted.escaping import escaped
from .version import VERSION

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(argv: list[str] | None = None) -> int:
    about = "Inspects, verifies, compares, converts, lists and prunes checkpoints, and tells what is installed."
    parser = _Parser(prog="statedict-io", description=about)
    parser.add_argument("--version", action="version", version=f"statedict-io {VERSION}, torch {torch.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="say which backend is active and why")
    info.set_defaults(run=lambda _: _info())

    inspect_ = commands.add_parser("inspect", help="list the tensors of a checkpoint without reading them")
    inspect_.add_argument("file", metavar="FILE")
    inspect_.add_argument("--json", action="store_true", help="for machines")
    inspect_.set_defaults(run=lambda a: inspect.run(a.file, as_json=a.json))

    verify_ = commands.add_parser(
        "verify",
        help="check every CRC; exit code 0 all sound, 1 a file is corrupt, 2 one cannot be read or is no checkpoint",
    )
    verify_.add_argument("files", metavar="FILE", nargs="+")
    verify_.add_argument("--json", action="store_true", help="for machines")
    verify_.set_defaults(run=lambda a: verify.run(a.files, as_json=a.json))

    diff_ = commands.add_parser(
        "diff", help="compare the tensors of two checkpoints; exit code 0 equal, 1 they differ, 2 one cannot be read"
    )
    diff_.add_argument("a", metavar="A")
    diff_.add_argument("b", metavar="B")
    diff_.add_argument("--json", action="store_true", help="for machines")
    diff_.add_argument(
        "--trust", action="store_true", help="unpickle whatever A and B need: their authors can run code here"
    )
    diff_.set_defaults(run=lambda a: diff.run(a.a, a.b, trust=a.trust, as_json=a.json))

    convert_ = commands.add_parser(
        "convert",
        help="from any kind of checkpoint to .safetensors, a file of torch.save or a directory of "
        "torch.distributed.checkpoint, in bounded memory",
    )
    convert_.add_argument("source", metavar="SRC")
    convert_.add_argument("destination", metavar="DST")
    convert_.add_argument(
        "--trust",
        action="store_true",
        help="unpickle whatever SRC needs: its author can run code here; without it that is refused",
    )
    convert_.add_argument(
        "--in-place",
        action="store_true",
        help="write into the file DST (of a directory: its .metadata) itself, where it cannot be replaced as a whole; "
        "if that fails, it is damaged",
    )
    convert_.add_argument(
        "--max-shard-size",
        "--max-shard-nbytes",
        type=_shard_nbytes,
        metavar="SIZE",
        help="write .safetensors shards of at most so many bytes of tensors, such as 5GB, and an index; DST is a "
        "directory, or the name of the index in one",
    )
    convert_.add_argument(
        "--digest", choices=["sha256"], help="write the sums of what is written beside it, for sha256sum -c"
    )
    convert_.set_defaults(
        run=lambda a: convert.run(
            a.source,
            a.destination,
            trust=a.trust,
            in_place=a.in_place,
            max_shard_nbytes=a.max_shard_size,
            digest=a.digest,
        )
    )

    list_ = commands.add_parser(
        "list", help="list the checkpoints of a directory; exit code 0 all sound, 1 one is damaged, 2 it cannot be read"
    )
    _add_directory(list_)
    list_.add_argument(
        "--verify",
        choices=["digest", "crc", "structure", "none"],
        default="structure",
        help="read every byte, for checksums and a noted digest or for checksums alone, or the ends of each file "
        "(default), or nothing",
    )
    list_.add_argument("--json", action="store_true", help="for machines")
    list_.set_defaults(run=lambda a: listing.run(a.directory, a.pattern, verify=a.verify, as_json=a.json))

    prune_ = commands.add_parser(
        "prune", help="delete the checkpoints that no --keep option keeps; never the newest sound one"
    )
    _add_directory(prune_)
    prune_.add_argument("--keep-last", type=int, metavar="N", help="the newest")
    prune_.add_argument("--keep-every", type=int, metavar="N", help="steps that are multiples of N")
    prune_.add_argument("--keep-best", type=int, metavar="N", help="those with the best metric")
    prune_.add_argument("--best", choices=["min", "max"], help="which metric is the best")
    prune_.add_argument("--dry-run", action="store_true", help="only say what would go")
    prune_.set_defaults(
        run=lambda a: prune.run(
            a.directory,
            a.pattern,
            keep_last=a.keep_last,
            keep_every=a.keep_every,
            keep_best=a.keep_best,
            best=a.best,
            dry_run=a.dry_run,
        )
    )

    bench_ = commands.add_parser("bench", help="time torch.save and statedict_io here, side by side")
    bench_.add_argument(
        "--size", type=_nbytes, default=_nbytes("1GiB"), help="of the state dict, such as 512MiB (default 1GiB)"
    )
    bench_.add_argument("--device", default="cpu", help="where the tensors are (default cpu)")
    bench_.add_argument("--dir", default=".", help="where the files go: measures that file system (default .)")
    bench_.add_argument("--rounds", type=int, default=5, help="measured rounds, after one warm-up (default 5)")
    bench_.add_argument("--plot", metavar="OUT.png", help="also draw the result")
    bench_.set_defaults(run=_bench)

    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (ImportError, OSError, ValueError, StateDictIOError, pickle.UnpicklingError) as e:
        complain(str(e))
    except Exception as e:  # a hostile file can make an unpickler raise anything
        complain(f"{type(e).__name__}: {e}")
    return 2


def _bench(arguments: argparse.Namespace) -> None:
    a = arguments
    bench.run(a.size, a.device, a.dir, a.rounds, a.plot)


def _add_directory(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory", metavar="DIR")
    command.add_argument(
        "--pattern", metavar="NAME", default=None, help="of the files' names (default step-{step:08d}.pt)"
    )


def _info() -> None:
    for line in str(backend_info()).splitlines():
        say(line)


class _Parser(argparse.ArgumentParser):
    """Complaints quote arguments, which a shell's pattern may have made of names of files."""

    def error(self, message: str) -> NoReturn:
        super().error(escaped(message, sys.stderr.encoding))


def _nbytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"not a size: {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _shard_nbytes(text: str) -> int:
    """As huggingface_hub and transformers understand it: of ``5GB`` and ``5GiB`` the second is larger."""
    match = re.fullmatch(r"(\d+)\s*(?:([KMGT])(I?)B)?", text.upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"not a size such as 5GB: {text!r}")
    return int(match[1]) * (1024 if match[3] else 1000) ** (" KMGT".index(match[2] or " "))


if __name__ == "__main__":
    sys.exit(main())
