"""Which values of a save torch's restricted unpickler will refuse: said when they are written, by the one who knows."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Sequence

from torch.serialization import get_unsafe_globals_in_checkpoint

from ..untrusted.limits import listed
from .orders import Written


def warn_of_refused(path: str, written: Sequence[Written]) -> None:
    """Warns once, with the names of the values and of the classes and functions that are not allowed.

    Args:
        path: of the file.
        written: by each rank.
    """
    refused = []
    for part in written:
        for name, data in part.opaque.items():
            needs = _needs(data)
            if needs:
                refused.append(f"{name!r} (needs {', '.join(needs)})")
    if refused:
        warnings.warn(
            f"{path}: torch's restricted unpickler will refuse {listed(refused)}; only "
            "weights_only=False reads that back: SingleFileReader(path, weights_only=False)",
            stacklevel=2,
        )


def _needs(data: bytes) -> list[str]:
    """
    Args:
        data: of a value that DCP has pickled with ``torch.save``.
    """
    try:
        return sorted(get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except pickle.UnpicklingError as e:  # an opcode that the restricted unpickler does not know
        return [str(e)]
