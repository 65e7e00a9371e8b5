"""``convert``: from any kind of file to ``.pt`` or ``.safetensors``; memory does not grow with the tensors."""

from __future__ import annotations

import os

from ..progress import Progress, reporting
from ..reading.lazy.checkpoint import open_checkpoint
from ..writing.targets import FileTarget, resolve
from .outcome import Conversion as Conversion
from .to_pt import to_pt
from .to_safetensors import to_safetensors

SAFETENSORS = ".safetensors"


def convert(
    source: str,
    destination: str,
    *,
    weights_only: bool = True,
    progress: Progress = None,
    atomic: bool = True,
) -> Conversion:
    """Converts a checkpoint of any kind that :func:`statedict_io.open_checkpoint` opens. The destination is replaced
    atomically.

    Args:
        source: a path or URL.
        destination: a path. One that ends in ``.safetensors`` becomes such a file, any other one of ``torch.save``. In
            that everything is kept that was in a file of ``torch.save``; of other kinds it holds a dict of tensors.
        weights_only: unpickle with torch's restricted unpickler: the security boundary. Use ``False`` only for what you
            trust.
        progress: ``True`` for a bar on stderr (needs ``tqdm``), or a callable taking (bytes_done, bytes_total).
        atomic: ``False`` writes into the destination itself, as for :func:`statedict_io.save`.

    Raises:
        OSError: what the system reported.
        ValueError: the destination is no file.
        StateDictIOError: there are tensors that the other format cannot hold; names them.
        CorruptCheckpointError: the source is not sound.
        FileKindError: it is of a kind that is not read here.
        pickle.UnpicklingError: it needs a class that is refused; names it.
    """
    makes_safetensors = destination.endswith(SAFETENSORS)
    target = resolve(destination, names_archive=not makes_safetensors)
    if not isinstance(target, FileTarget):
        raise ValueError(f"{destination}: is not a regular file, and only those can be replaced as a whole")
    try:
        if not atomic and _is_same(target, source):
            raise ValueError(f"{destination}: is {source} under another name; it cannot be written in place")
        with (
            reporting(progress, "convert") as callback,
            open_checkpoint(source, weights_only=weights_only) as checkpoint,
        ):
            write = to_safetensors if makes_safetensors else to_pt
            return write(checkpoint, target, callback, atomic)
    finally:
        target.close()


def _is_same(target: FileTarget, source: str) -> bool:
    existing = target.existing
    return existing is not None and os.path.exists(source) and os.path.samestat(existing, os.stat(source))
