"""``statedict-io convert [--trust] [--max-shard-size SIZE] [--digest sha256] SRC DST``."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence

from ..conversion import Conversion, convert
from ..reading.opened_bytes import open_bytes
from ..reading.records import kind_of
from ..reading.weight_folders import is_folder
from ..remote.urls import is_url
from ..untrusted.limits import listed
from .printing import bar_wanted, complain, nbytes_text, say

_UNTIED = "shared memory with another and now have their own copy"


def run(
    source: str,
    destination: str,
    *,
    trust: bool,
    in_place: bool,
    max_shard_nbytes: int | None = None,
    digest: str | None = None,
) -> int:
    """Returns the exit code.

    Args:
        trust: unpickle without restriction.
        in_place: write into the destination itself, not beside it.
        max_shard_nbytes: write shards; None: one file, or a directory of DCP.
        digest: ``"sha256"`` writes sums beside what is written.

    Raises:
        OSError, ValueError, StateDictIOError, pickle.UnpicklingError: as :func:`statedict_io.conversion.convert`.
    """
    if max_shard_nbytes is None and _names_directory(destination):
        if digest is not None:
            raise ValueError(f"{destination}: a directory of torch.distributed.checkpoint has no sums beside it")
        return _to_dcp(source, destination, trust=trust, in_place=in_place)
    done = convert(
        source,
        destination,
        weights_only=not trust,
        progress=bar_wanted(),
        atomic=not in_place,
        max_shard_nbytes=max_shard_nbytes,
        digest=digest,
    )
    _say_done(destination, done)
    return 0


def _say_done(destination: str, done: Conversion) -> None:
    tensors = f"{done.num_tensors} tensor{'' if done.num_tensors == 1 else 's'}"
    say(f"{destination}: {tensors}, {nbytes_text(done.nbytes)}")
    for name, hexdigest in done.sums.items():
        say(f"{hexdigest}  {name}")
    _note("left out, only tensors are held by that format", done.left_out)
    _note(_UNTIED, done.untied)
    _note("left out, a file of torch.save has no place for metadata", done.metadata_left_out)


def _is_dcp(source: str) -> bool:
    """Whether a directory is one of torch.distributed.checkpoint, and not a folder of weights."""
    return os.path.isdir(source) and os.path.exists(os.path.join(source, ".metadata"))


def _names_directory(destination: str) -> bool:
    """Whether a checkpoint directory is wanted: something without a suffix, or a directory that is there."""
    if is_url(destination):
        return False
    return destination.endswith(os.sep) or os.path.isdir(destination) or not os.path.splitext(destination)[1]


def _to_dcp(source: str, destination: str, *, trust: bool, in_place: bool) -> int:
    from ..dcp.conversion import file_to_dcp  # imports torch.distributed

    if _is_dcp(source):
        raise ValueError(f"{source}, {destination}: both are directories of torch.distributed.checkpoint: copy it")
    with contextlib.ExitStack() as exit_stack:
        if not _is_archive(source):
            archive = exit_stack.enter_context(_beside(destination))
            convert(source, archive, weights_only=not trust, progress=bar_wanted())
            source = archive
        done = file_to_dcp(source, destination, weights_only=not trust, atomic=not in_place)
        _note("keys that are not strings have become strings, in", done.renamed)
        _note(_UNTIED, done.untied)
    say(f"{destination}: converted")
    return 0


def _is_archive(source: str) -> bool:
    """Whether it is a file in torch's zip format, sound or damaged."""
    if is_folder(source):
        return False
    with open_bytes(source) as opened:
        return kind_of(opened) is None


@contextlib.contextmanager
def _beside(destination: str) -> Iterator[str]:
    """A path for an archive of ``torch.save`` on the way, which is gone after the block."""
    folder = os.path.dirname(destination.rstrip(os.sep)) or "."
    with tempfile.TemporaryDirectory(prefix=".statedict-io-", dir=folder) as at:
        yield os.path.join(at, "converted.pt")


def _note(what: str, names: Sequence[str]) -> None:
    if names:
        complain(f"{what}: {listed(names)}")
