"""``statedict-io convert SRC DST``."""

from __future__ import annotations

import sys

from ..conversion import convert
from ..progress import reporting
from .printing import bar_wanted, nbytes_text, printable


def run(source: str, destination: str) -> int:
    """Returns the exit code.

    Raises:
        OSError, ValueError, StateDictIOError, pickle.UnpicklingError: as :func:`statedict_io.conversion.convert`.
    """
    with reporting(True if bar_wanted() else None, "convert") as progress:
        done = convert(source, destination, progress=progress)
    print(f"{printable(destination)}: {done.num_tensors} tensors, {nbytes_text(done.nbytes)}")
    _note("left out, safetensors holds tensors only", done.left_out)
    _note("shared memory with another and now have their own copy", done.untied)
    return 0


def _note(what: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(printable(name) or "the object itself" for name in names[:8])
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        print(f"statedict-io: {what}: {shown}{more}", file=sys.stderr)
