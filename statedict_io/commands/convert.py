"""``statedict-io convert [--trust] SRC DST``."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..conversion import convert
from ..untrusted.limits import listed
from .printing import bar_wanted, complain, nbytes_text, say

_UNTIED = "shared memory with another and now have their own copy"


def run(source: str, destination: str, *, trust: bool, in_place: bool) -> int:
    """Returns the exit code.

    Args:
        trust: unpickle without restriction.
        in_place: write into the destination itself, not beside it.

    Raises:
        OSError, ValueError, StateDictIOError, pickle.UnpicklingError: as :func:`statedict_io.conversion.convert`.
    """
    if os.path.isdir(source) or _names_directory(source, destination):
        return _run_dcp(source, destination, trust=trust, in_place=in_place)
    done = convert(source, destination, weights_only=not trust, progress=bar_wanted(), atomic=not in_place)
    say(f"{destination}: {done.num_tensors} tensor{'' if done.num_tensors == 1 else 's'}, {nbytes_text(done.nbytes)}")
    _note("left out, safetensors holds tensors only", done.left_out)
    _note(_UNTIED, done.untied)
    _note("left out, a file of torch.save has no place for metadata", done.metadata_left_out)
    return 0


def _names_directory(source: str, destination: str) -> bool:
    """Whether a checkpoint directory is wanted: something without a suffix, or a directory that is there."""
    if source.endswith(".safetensors"):
        return False
    return destination.endswith(os.sep) or os.path.isdir(destination) or not os.path.splitext(destination)[1]


def _run_dcp(source: str, destination: str, *, trust: bool, in_place: bool) -> int:
    from ..dcp.conversion import dcp_to_file, file_to_dcp  # imports torch.distributed

    if os.path.isdir(source):
        dcp_to_file(source, destination, weights_only=not trust, progress=bar_wanted(), atomic=not in_place)
    else:
        done = file_to_dcp(source, destination, weights_only=not trust, atomic=not in_place)
        _note("keys that are not strings have become strings, in", done.renamed)
        _note(_UNTIED, done.untied)
    say(f"{destination}: converted from {source}")
    return 0


def _note(what: str, names: Sequence[str]) -> None:
    if names:
        complain(f"{what}: {listed(names)}")
