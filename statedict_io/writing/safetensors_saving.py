"""``save_safetensors``: the bytes of ``safetensors.torch.save_file``, put into place as ``save`` does; and sets of
shards, as ``huggingface_hub.save_torch_state_dict`` has them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import backends
from .. import progress as progress_module
from ..backends.protocol import Backend, Content
from ..errors import StateDictIOError, as_raised, naming
from ..options import check_at_least, check_flags
from ..progress import Progress
from ..remote.urls import is_url
from ..system.directories import SEPARATORS, OpenDirectory, split
from . import safetensors_tensors, shards
from .in_flight import Call, current_call, register
from .saving import planned_for, wanted_digest, write_planned
from .shard_sets import ShardSet
from .targets import resolve


def save_safetensors(
    state_dict: dict[str, torch.Tensor],
    path: Any,
    metadata: dict[str, str] | None = None,
    *,
    max_shard_nbytes: int | None = None,
    durable: bool = True,
    backend: str = "auto",
    progress: Progress = None,
    atomic: bool = True,
    digest: str | None = None,
) -> str | dict[str, str] | None:
    """Saves tensors as ``safetensors.torch.save_file`` would, byte for byte, faster and safely. The safetensors package
    is not needed.

    Args:
        state_dict: name -> tensor. Tensors are dense, contiguous, and share no memory: what ``save_file`` refuses is
            refused here.
        path: as ``f`` of :func:`save`; it should end in ``.safetensors``. With ``max_shard_nbytes`` a directory, or a
            path in one that ends so.
        metadata: texts for the file's header, such as ``{"format": "pt"}``; they keep their order.
        max_shard_nbytes: write a set of files as ``huggingface_hub.save_torch_state_dict`` does, each of at most so
            many bytes of tensors, but for tensors that are larger, and an index that says where each tensor is:
            ``model-00001-of-00003.safetensors``, ..., ``model.safetensors.index.json``. What fits into one file is
            ``model.safetensors`` and has no index. Tensors are made contiguous, and of those that share memory one is
            kept. Files of earlier sets of this name are removed when the new one is in force.
        durable, backend, progress: as for :func:`save`.
        atomic: as for :func:`save`; sets of files are always written so.
        digest: as for :func:`save`. Of a set the sums of all its files, the index included, are in one file beside the
            index: ``model.safetensors.index.json.sha256``.

    Returns:
        The sum, where one is wanted; of a set one for the name of each file.

    Raises:
        ValueError, RuntimeError, KeyError, TypeError, NotImplementedError: where ``save_file`` raises one: for what is
            no tensor, sparse or not contiguous, for tensors that share memory, for dtypes that the format does not
            know, for names and metadata that are no text, for tensors without data. Each is a
            :class:`StateDictIOError` too, names the tensors, and has left the target untouched.
        OSError, NativeUnavailableError: as of :func:`save`.

    Example:
        >>> sio.save_safetensors(model.state_dict(), "model.safetensors", metadata={"format": "pt"})
        >>> sio.load("model.safetensors").keys() == model.state_dict().keys()
        True
    """
    check_flags(durable=durable, atomic=atomic)
    progress_module.check(progress)
    safetensors_tensors.check_metadata(metadata)
    chosen = backends.usable(backend)
    wanted = wanted_digest(digest)
    if max_shard_nbytes is not None:
        check_at_least(1, max_shard_nbytes=max_shard_nbytes)
        if not atomic:
            raise ValueError("atomic=False cannot be combined with max_shard_nbytes: a set of files needs new names")
        with Call():
            sums = _save_set(
                state_dict,
                path,
                metadata,
                max_shard_nbytes,
                durable=durable,
                chosen=chosen,
                progress=progress,
                is_hashed=wanted is not None,
            )
            backends.warn_if_not_compiled(backend)
        return sums
    with Call():
        planned = planned_for(
            resolve(path, names_archive=False),
            lambda _: chosen.plan_gapless(
                safetensors_tensors.parts(safetensors_tensors.checked(state_dict, str(path)), metadata, str(path))
            ),
        )
        backends.warn_if_not_compiled(backend)
        write_planned(planned, durable=durable, progress=progress, atomic=atomic, digest=wanted)
    return None if wanted is None else wanted.hexdigest()


def _save_set(
    state_dict: Any,
    path: Any,
    metadata: dict[str, str] | None,
    max_shard_nbytes: float,
    *,
    durable: bool,
    chosen: Backend,
    progress: Progress,
    is_hashed: bool,
) -> dict[str, str] | None:
    folder, stem = place_of_set(path)
    tensors, described = shards.kept(state_dict, metadata, os.path.join(folder, stem + shards.SUFFIX))
    groups, total_nbytes = shards.split(shards.storages_of(tensors), max_shard_nbytes)
    of_file = {"format": "pt", **(described if len(groups) == 1 else {})}
    names = shards.names_of(stem, len(groups))
    contents = [
        chosen.plan_gapless(
            safetensors_tensors.parts({key: tensors[key] for key in group}, of_file, os.path.join(folder, name))
        )
        for name, group in zip(names, groups, strict=True)
    ]
    return write_set(
        folder,
        stem,
        contents,
        lambda files: shards.index(files, groups, total_nbytes, described),
        durable=durable,
        progress=progress,
        is_hashed=is_hashed,
    )


def write_set(
    folder: str,
    stem: str,
    contents: Sequence[Content],
    index_of: Callable[[Sequence[str]], bytes],
    *,
    durable: bool,
    progress: Progress,
    is_hashed: bool,
) -> dict[str, str] | None:
    """Writes a set and puts it into place, for the innermost call, after asynchronous saves of it that were started
    earlier.

    Args:
        folder: exists.
        contents, index_of: as of :meth:`ShardSet.write`.

    Returns:
        The sums of the files, where they are wanted.
    """
    with naming(folder):
        directory = OpenDirectory(folder)
    try:
        call = current_call()
        call.file = lambda: directory.identity_of(stem + shards.SUFFIX)
        if register.in_flight:
            register.wait_for_earlier(call, call.file())
        with progress_module.reporting(progress, stem) as callback:
            written = ShardSet(directory, stem, durable=durable, is_hashed=is_hashed)
            written.write(contents, index_of, callback, call.is_superseded)
        call.committed = True
        return written.sums if is_hashed else None
    finally:
        directory.close()


def place_of_set(path: Any, *, may_be_missing: bool = False) -> tuple[str, str]:
    """The directory of a set, and the name with which all its files begin.

    Args:
        may_be_missing: what has no suffix is a directory that will be made.

    Raises:
        TypeError, ValueError: ``path`` is neither a directory nor a name in one; StateDictIOErrors too.
    """
    given = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    if not isinstance(given, str) or is_url(given):
        raise as_raised(
            StateDictIOError,
            TypeError if not isinstance(given, str) else ValueError,
            f"max_shard_nbytes writes several files, for which the path of a local directory is needed, got {given!r}",
        )
    if given.endswith(tuple(SEPARATORS)) or _is_directory(given):
        return given, "model"
    folder, name = split(given)
    for suffix in (shards.INDEX_SUFFIX, shards.SUFFIX):
        if name.endswith(suffix) and name != suffix:
            return folder or os.curdir, name.removesuffix(suffix)
    if may_be_missing and not os.path.splitext(name)[1]:
        return given, "model"
    raise as_raised(
        StateDictIOError,
        ValueError,
        f"{given}: a set of shards needs an existing directory, or a name that ends in {shards.SUFFIX}",
    )


def _is_directory(path: str) -> bool:
    """
    Raises:
        OSError: the system does not tell.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
