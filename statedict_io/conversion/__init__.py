"""``convert``: between ``.pt`` and ``.safetensors``, streaming: memory does not grow with the tensors."""

from __future__ import annotations

import os

from ..progress import Progress, reporting
from ..reading.lazy.checkpoint import open_checkpoint
from ..writing.targets import FileTarget, resolve
from .outcome import Conversion as Conversion
from .to_pt import to_pt
from .to_safetensors import to_safetensors

_SAFETENSORS = ".safetensors"


def convert(
    source: str,
    destination: str,
    *,
    weights_only: bool = True,
    progress: Progress = None,
    atomic: bool = True,
) -> Conversion:
    """Converts by the names' suffixes: one has to end in ``.safetensors``. The destination is replaced atomically.

    Args:
        source, destination: paths.
        weights_only: unpickle with torch's restricted unpickler: the security boundary. Use ``False`` only for what you
            trust.
        progress: ``True`` for a bar on stderr (needs ``tqdm``), or a callable taking (bytes_done, bytes_total).
        atomic: ``False`` writes into the destination itself, as for :func:`statedict_io.save`.

    Raises:
        OSError: what the system reported.
        ValueError: not one of the two names ends in ``.safetensors``, or the destination is no file.
        StateDictIOError: there are tensors that the other format cannot hold; names them.
        CorruptCheckpointError: the source is not sound.
        pickle.UnpicklingError: it needs a class that is refused; names it.
    """
    makes_safetensors = destination.endswith(_SAFETENSORS)
    if makes_safetensors == source.endswith(_SAFETENSORS):
        raise ValueError(
            f"{source}, {destination}: one of the two has to end in {_SAFETENSORS}, or be a directory of "
            f"torch.distributed.checkpoint, whose name may end in {os.sep!r}"
        )
    target = resolve(destination, names_archive=not makes_safetensors)
    if not isinstance(target, FileTarget):
        raise ValueError(f"{destination}: is not a regular file, and only those can be replaced as a whole")
    try:
        if not atomic and target.existing is not None and os.path.samestat(target.existing, os.stat(source)):
            raise ValueError(f"{destination}: is {source} under another name; it cannot be written in place")
        with reporting(progress, "convert") as callback:
            if makes_safetensors:
                with open_checkpoint(source, weights_only=weights_only) as checkpoint:
                    return to_safetensors(checkpoint, target, callback, atomic)
            return to_pt(source, target, callback, atomic)
    finally:
        target.close()
