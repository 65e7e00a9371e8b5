"""The SHA-256 that a file should have, where something beside it says so."""

from __future__ import annotations

import contextlib
import os
import re
from typing import NamedTuple

from ..formats import sums
from ..progress import ProgressCallback
from ..system.file_digest import SUFFIX
from .opened_bytes import OpenedBytes

_BLOCK_NBYTES = 4 << 20
_HEX = re.compile(r"[0-9a-f]{64}")


class Expected(NamedTuple):
    sha256: str  #: in lower case
    said_by: str  #: the file that says so


def expected_sha256(path: str, index: str | None = None) -> Expected | None:
    """What is said of a file: by ``PATH.sha256`` or ``SHA256SUMS`` beside it, in a form that ``sha256sum -c`` takes;
    else by huggingface_hub, which keeps the digest of each large file that it has downloaded. None: nothing is.

    Args:
        index: of the set of shards that the file is one of; ``INDEX.sha256`` has the sums of them all.

    Raises:
        OSError: something that should say it cannot be read.
        ValueError: ``PATH.sha256`` does not tell it; names that file.
    """
    folder, name = os.path.split(path)
    own = path + SUFFIX
    text = _text_of(own)
    if text is not None:
        found = sums.alone(text) or dict(sums.named(text)).get(name)
        if found is None:
            raise ValueError(f"{own}: has no SHA-256 of {name!r}")
        return Expected(found, own)
    for of_several in ([] if index is None else [index + SUFFIX]) + [os.path.join(folder, "SHA256SUMS")]:
        text = _text_of(of_several)
        if text is not None and (found := dict(sums.named(text)).get(name)) is not None:
            return Expected(found, of_several)
    return _of_hub(path, folder, name)


def _of_hub(path: str, folder: str, name: str) -> Expected | None:
    # In its cache a file is a link to one that is called by its digest.
    blobs, blob = os.path.split(os.path.realpath(path))
    if _HEX.fullmatch(blob) and os.path.basename(blobs) == "blobs":
        return Expected(blob, "its name in the cache of huggingface_hub")
    # In a folder that it was told to download to: the commit, the digest, and when that was.
    metadata = os.path.join(folder, ".cache", "huggingface", "download", f"{name}.metadata")
    lines = (_text_of(metadata) or "").split("\n")
    with contextlib.suppress(ValueError, IndexError):
        # As huggingface_hub does it: what was changed since is another file.
        if _HEX.fullmatch(lines[1].strip()) and os.stat(path).st_mtime - 1 <= float(lines[2]):
            return Expected(lines[1].strip(), metadata)
    return None


def _text_of(path: str) -> str | None:
    """None: there is no such file, or it is none of these."""
    try:
        with open(path, "rb") as file:
            data = file.read(sums.MAX_NBYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return sums.decoded(data) if len(data) <= sums.MAX_NBYTES else None


def sha256_of(opened: OpenedBytes, progress: ProgressCallback | None) -> str:
    """Of the whole file."""
    import hashlib

    digest = hashlib.sha256()
    done = 0
    while block := opened.read_at(done, _BLOCK_NBYTES):
        digest.update(block)
        done += len(block)
        if progress is not None:
            progress(done, opened.nbytes)
    return digest.hexdigest()
