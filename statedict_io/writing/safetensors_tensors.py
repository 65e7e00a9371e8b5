"""Which tensors a safetensors file can hold, and where their bytes are: the rules of ``safetensors.torch.save_file``.

What it refuses is refused here with an error that can be caught as the one that it raises, and that names every tensor
and a cure. There is one rule more: a tensor whose conjugation or negation is still to be done is written as the values
that it has; the package writes those that lie in its memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..backends.protocol import StorageRange
from ..errors import StateDictIOError, as_raised
from ..formats import safetensors_format
from ..formats.safetensors_header import METADATA
from ..untrusted.limits import listed


def checked(state_dict: Any, path: str) -> dict[str, torch.Tensor]:
    """What is to be written, in the order of ``state_dict``.

    Raises:
        ValueError, RuntimeError, TypeError, KeyError, NotImplementedError: as ``save_file``; all of them are
            :class:`StateDictIOError` too.
    """
    check_tensors(state_dict)
    if shared := sharing(state_dict):
        groups = "; ".join(listed(sorted(names)) for names in shared)
        raise _refused(
            RuntimeError,
            f"these tensors share memory, which a safetensors file cannot express, and would be written several times: "
            f"{groups}; drop all but one of each group from the state dict, or .clone() the others; "
            "max_shard_nbytes=... keeps one of each by itself, as huggingface_hub does",
        )
    if loose := [name for name, tensor in state_dict.items() if not tensor.is_contiguous()]:
        raise _refused(
            ValueError,
            f"non contiguous tensors cannot be saved as safetensors: {listed(loose)}; call .contiguous() on them, or, "
            "where they are parts of others, save only those and slice after loading",
        )
    check_storable(state_dict, path)
    return {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in state_dict.items()}


def check_tensors(state_dict: Any) -> None:
    if not isinstance(state_dict, dict):
        raise _refused(
            ValueError,
            f"expected a dict of [str, torch.Tensor] but received {type(state_dict)}; of a module take .state_dict()",
        )
    sparse = []
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise _refused(
                ValueError,
                f"{name!r} is a {type(tensor).__name__}, and a safetensors file holds tensors only: leave it out, put "
                "it into `metadata` as text, or use statedict_io.save",
            )
        if tensor.layout != torch.strided:
            sparse.append(name)
    if sparse:
        raise _refused(
            ValueError,
            f"sparse tensors cannot be saved as safetensors: {listed(sparse)}; make them dense with .to_dense(), which "
            "may take much more space, or use statedict_io.save",
        )


def check_storable(tensors: Mapping[Any, torch.Tensor], path: str) -> None:
    """Names, dtypes, and that there is data."""
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise _refused(TypeError, f"the name of a tensor must be a str, got {name!r}")
        try:
            safetensors_format.check_name(name, path)
        except StateDictIOError as e:
            raise _refused(UnicodeEncodeError if name != METADATA else ValueError, str(e)) from None
        if tensor.dtype not in safetensors_format.NAMES:
            raise _refused(
                KeyError,
                f"{name!r} is {tensor.dtype}, which a safetensors file cannot hold: convert it to another dtype",
            )
        if tensor.is_meta:
            raise _refused(
                NotImplementedError, f"{name!r} is on the meta device and has no data: load or initialize it first"
            )
        if not tensor.shape and tensor.dtype is safetensors_format.PAIRS:
            raise _refused(ValueError, f"{name!r}: a {tensor.dtype} without a dimension cannot be saved as safetensors")


def check_metadata(metadata: Any) -> None:
    """
    Raises:
        TypeError: it is no dict of texts, or None.
        UnicodeEncodeError: a text that cannot be expressed in UTF-8.
    """
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise _refused(TypeError, f"metadata must be a dict of str, or None, got {metadata!r}")
    for key, value in metadata.items():
        for text in (key, value):
            if not isinstance(text, str):
                raise _refused(TypeError, f"metadata must have str as keys and as values, got {key!r}: {value!r}")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise _refused(UnicodeEncodeError, f"metadata: {text!r} cannot be expressed in UTF-8") from None


def parts(
    tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None, path: str
) -> Sequence[bytes | StorageRange]:
    """A whole file, for :meth:`~statedict_io.backends.protocol.Backend.plan_gapless`.

    Args:
        tensors: contiguous, and otherwise as :func:`check_storable` wants them.
        path: for messages.
    """
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    header, names = safetensors_format.planned(shapes, metadata, path)
    return [header, *_ranges((name, tensors[name]) for name in names)]


def _ranges(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterable[StorageRange]:
    for name, tensor in tensors:
        itemsize = tensor.dtype.itemsize
        nbytes = math.prod(tensor.shape) * itemsize
        if nbytes:
            yield StorageRange(f"tensor {name!r}", tensor.untyped_storage(), tensor.storage_offset() * itemsize, nbytes)


def sharing(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Groups of names whose tensors overlap in memory, as the package finds them: tensors of one storage, each with the
    one that begins before it."""
    by_storage: dict[tuple[torch.device, int, int], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            continue
        storage = tensor.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if address and nbytes:
            by_storage.setdefault((tensor.device, address, nbytes), []).append(name)
    return [
        group
        for names in by_storage.values()
        if len(names) > 1
        for group in _overlapping(names, tensors)
        if len(group) > 1
    ]


def _overlapping(names: Iterable[str], tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    areas = sorted((*_area(tensors[name]), name) for name in names)
    groups: list[list[str]] = []
    last_stop = -1
    for start, stop, name in areas:
        if groups and start < last_stop:
            groups[-1].append(name)
        else:
            groups.append([name])
        last_stop = stop
    return groups


def _area(tensor: torch.Tensor) -> tuple[int, int]:
    """From the address of its first element to that behind its last, which in a view need not be those furthest
    apart: it is what the package compares."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (steps + 1) * tensor.dtype.itemsize


def _refused(kind: type[Exception], message: str) -> Exception:
    return as_raised(StateDictIOError, kind, message)
