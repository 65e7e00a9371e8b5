"""``convert``: from any kind of file to ``.pt``, ``.safetensors`` or shards of that; memory does not grow with the
tensors."""

from __future__ import annotations

import os

from ..options import check_at_least
from ..progress import Progress, reporting
from ..reading.lazy.checkpoint import open_checkpoint
from ..writing.in_flight import Call, current_call
from ..writing.safetensors_saving import place_of_set
from ..writing.saving import wanted_digest
from ..writing.targets import FileTarget, URLTarget, resolve
from .outcome import Conversion as Conversion
from .to_pt import to_pt
from .to_safetensors import to_safetensors
from .to_shards import to_shards

SAFETENSORS = ".safetensors"
INDEX = ".index.json"


def convert(
    source: str,
    destination: str,
    *,
    weights_only: bool = True,
    progress: Progress = None,
    atomic: bool = True,
    max_shard_nbytes: int | None = None,
    digest: str | None = None,
) -> Conversion:
    """Converts a checkpoint of any kind that :func:`statedict_io.open_checkpoint` opens. The destination is replaced
    atomically.

    Args:
        source: a path or URL.
        destination: a path or URL. One that ends in ``.safetensors`` becomes such a file, any other one of
            ``torch.save``. In that everything is kept that was in a file of ``torch.save``; of other kinds it holds a
            dict of tensors.
        weights_only: unpickle with torch's restricted unpickler: the security boundary. Use ``False`` only for what you
            trust.
        progress: ``True`` for a bar on stderr (needs ``tqdm``), or a callable taking (bytes_done, bytes_total).
        atomic: ``False`` writes into the destination itself, as for :func:`statedict_io.save`; not for shards.
        max_shard_nbytes: write shards and an index, as for :func:`statedict_io.save_safetensors`. ``destination`` is a
            directory, which is made where it is missing, or a path in one that ends in ``.safetensors`` or
            ``.safetensors.index.json``. A set of shards that is there is replaced as a whole, also where it is the
            source.
        digest: ``"sha256"`` hashes what is written, and writes the sums beside it, as for :func:`statedict_io.save`.

    Raises:
        OSError: what the system reported.
        ValueError: the destination is neither a file nor an object of a store, or shards are wanted at a place for one
            file, or the other way round.
        StateDictIOError: there are tensors that the other format cannot hold; names them.
        CorruptCheckpointError: the source is not sound.
        FileKindError: it is of a kind that is not read here.
        pickle.UnpicklingError: it needs a class that is refused; names it.
    """
    wanted = wanted_digest(digest)
    if max_shard_nbytes is not None:
        check_at_least(1, max_shard_nbytes=max_shard_nbytes)
        if not atomic:
            raise ValueError("a set of shards cannot be written in place: it needs new names")
        folder, stem = place_of_set(destination, may_be_missing=True)
        with (
            Call(),
            reporting(progress, "convert") as callback,
            open_checkpoint(source, weights_only=weights_only) as checkpoint,
        ):
            return to_shards(checkpoint, folder, stem, max_shard_nbytes, callback, is_hashed=wanted is not None)
    if destination.endswith(INDEX):
        raise ValueError(f"{destination}: is the name of an index of shards: say how large these may be")
    makes_safetensors = destination.endswith(SAFETENSORS)
    with Call():
        target = resolve(destination, names_archive=not makes_safetensors)
        try:
            if not isinstance(target, (FileTarget, URLTarget)):
                raise ValueError(f"{destination}: is not a regular file, and only those can be replaced as a whole")
            if not atomic and isinstance(target, FileTarget) and _is_same(target, source):
                raise ValueError(f"{destination}: is {source} under another name; it cannot be written in place")
            current_call().file = lambda: target.identity
            with (
                reporting(progress, "convert") as callback,
                open_checkpoint(source, weights_only=weights_only) as checkpoint,
            ):
                write = to_safetensors if makes_safetensors else to_pt
                return write(checkpoint, target, callback, atomic, wanted)
        finally:
            target.close()


def _is_same(target: FileTarget, source: str) -> bool:
    existing = target.existing
    return existing is not None and os.path.exists(source) and os.path.samestat(existing, os.stat(source))
