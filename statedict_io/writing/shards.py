"""Which tensors go into which of several safetensors files, what these are called, and the index: as
``huggingface_hub.save_torch_state_dict`` has it, byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..errors import StateDictIOError, as_raised
from ..untrusted.limits import listed
from . import safetensors_tensors

SUFFIX = ".safetensors"
INDEX_SUFFIX = f"{SUFFIX}.index.json"


def kept(
    state_dict: Any, metadata: Mapping[str, str] | None, path: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors that are written, contiguous, and the metadata: of tensors that share memory the one that covers its
    whole storage and has the first name, and for each of the others an entry that says which that is.

    Raises:
        RuntimeError: tensors share memory and none of them covers its storage.
        ValueError, TypeError, KeyError, NotImplementedError: as for one file.
    """
    safetensors_tensors.check_tensors(state_dict)
    tensors, described = dict(state_dict), dict(metadata or {})
    for names in safetensors_tensors.sharing(state_dict):
        whole = sorted(name for name in names if _covers_its_storage(state_dict[name]))
        if not whole:
            raise as_raised(
                StateDictIOError,
                RuntimeError,
                f"these tensors share memory, and none of them covers its whole storage: {listed(sorted(names))}; "
                ".clone() them, or put the tensor into the state dict of which they are parts",
            )
        for name in sorted(names):
            if name != whole[0]:
                described.setdefault(name, whole[0])
                del tensors[name]
    safetensors_tensors.check_storable(tensors, path)
    plain = {name: tensor.detach().resolve_conj().resolve_neg().contiguous() for name, tensor in tensors.items()}
    return plain, described


def _covers_its_storage(tensor: torch.Tensor) -> bool:
    storage = tensor.untyped_storage()
    return tensor.data_ptr() == storage.data_ptr() and tensor.nbytes == storage.nbytes()


def storages_of(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Hashable, int]]:
    """For :func:`split`."""
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        yield name, (tensor.device, storage.data_ptr(), storage.nbytes()), storage.nbytes()


def split(storages: Iterable[tuple[str, Hashable, int]], max_shard_nbytes: float) -> tuple[list[list[str]], int]:
    """The names in each shard, and the bytes of all storages. In the order that is given; those of one storage stay
    together, and one that is larger has a shard of its own.

    Args:
        storages: name of a tensor, what tells its storage, and the bytes of that.
    """
    together: dict[Hashable, list[str]] = {}
    shards: list[list[str]] = []
    current: list[str] = []
    current_nbytes = total_nbytes = 0
    for name, storage, nbytes in storages:
        of_storage = together.setdefault(storage, [])
        of_storage.append(name)
        if len(of_storage) > 1:
            continue
        total_nbytes += nbytes
        if nbytes > max_shard_nbytes:
            shards.append([name])
            continue
        if current_nbytes + nbytes > max_shard_nbytes:
            shards.append(current)
            current, current_nbytes = [], 0
        current.append(name)
        current_nbytes += nbytes
    if current or not shards:
        shards.append(current)
    shard_of = {name: shard for shard in shards for name in shard}
    for first, *others in together.values():
        shard_of[first].extend(others)
    return shards, total_nbytes


def names_of(stem: str, num_shards: int) -> list[str]:
    if num_shards == 1:
        return [stem + SUFFIX]
    return [f"{stem}-{i + 1:05d}-of-{num_shards:05d}{SUFFIX}" for i in range(num_shards)]


def index(
    files: Sequence[str], shards: Sequence[Sequence[str]], total_nbytes: int, metadata: Mapping[str, str]
) -> bytes:
    """
    Args:
        files: the name of each shard.
    """
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    return json.dumps(
        {"metadata": {"total_size": total_nbytes, **metadata}, "weight_map": weight_map}, indent=2
    ).encode()


def is_of_set(stem: str, name: str) -> bool:
    """Whether ``name`` is that of a shard, an index, a single file or a sidecar of ``stem``, also one of a set whose
    saver was killed."""
    return (
        re.fullmatch(
            rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?(\.[0-9a-f]{{12}})?\.safetensors(\.index\.json)?(\.sha256)?", name
        )
        is not None
    )
