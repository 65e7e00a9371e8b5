"""From a checkpoint of any kind to a set of safetensors files with an index, block by block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ..errors import naming
from ..progress import ProgressCallback
from ..reading.lazy.checkpoint import Checkpoint
from ..system.directories import OpenDirectory, split
from ..writing import shards
from ..writing.safetensors_saving import write_set
from .outcome import Conversion
from .to_safetensors import Reports, content_of, holdable, outcome

_FORMAT = "format"


def to_shards(
    checkpoint: Checkpoint,
    folder: str,
    stem: str,
    max_shard_nbytes: int,
    progress: ProgressCallback | None,
    *,
    is_hashed: bool,
) -> Conversion:
    """
    Args:
        folder: made where it is missing.
        stem: with which the names of all files begin.
        is_hashed: sums of the files are wanted.
    """
    infos = holdable(checkpoint)
    groups, total_nbytes = shards.split(((name, name, info.nbytes) for name, info in infos.items()), max_shard_nbytes)
    metadata = checkpoint.metadata
    of_file = {_FORMAT: metadata.pop(_FORMAT, "pt")}
    contents = [
        content_of(
            checkpoint,
            {name: infos[name] for name in group},
            {**of_file, **metadata} if len(groups) == 1 else of_file,
            os.path.join(folder, file),
        )
        for file, group in zip(shards.names_of(stem, len(groups)), groups, strict=True)
    ]
    report = Reports(checkpoint, sum(content.nbytes for content in contents), progress)
    checkpoint.check(report.checked)
    with _made(folder):
        sums = write_set(
            folder,
            stem,
            contents,
            lambda files: shards.index(files, groups, total_nbytes, metadata),
            durable=True,
            progress=report.written,
            is_hashed=is_hashed,
        )
    return outcome(checkpoint, infos, sums or {})


@contextlib.contextmanager
def _made(folder: str) -> Iterator[None]:
    """The directory is there in the block, and on the disk; where it was made for that, and the block raises, it
    goes."""
    try:
        with naming(folder):
            os.mkdir(folder)
    except FileExistsError:
        yield
        return
    try:
        parent = OpenDirectory(split(folder.rstrip(os.sep))[0] or os.curdir)
        try:
            with naming(folder):
                parent.sync()
        finally:
            parent.close()
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what another has put there stays
            os.rmdir(folder)
        raise
