"""The safetensors format: eight bytes of header length, a JSON header, the tensors one after the other.

Written here and not by the ``safetensors`` package because that takes whole tensors: neither its ``save_file`` nor its
``serialize_file`` can be fed piece by piece. https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import StateDictIOError
from .safetensors_header import METADATA
from .safetensors_parsed import DTYPES, LENGTH_NBYTES, MAX_HEADER_NBYTES

#: two elements of the format are one of it
PAIRS = getattr(torch, "float4_e2m1fn_x2", None)
#: what can be written
NAMES = {dtype: name for name, dtype in DTYPES.items()} | ({} if PAIRS is None else {PAIRS: "F4"})


# As the safetensors package writes them: wide elements first, so that no tensor needs padding.
_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F4", "BOOL",
)  # fmt: skip
_RANKS = {dtype: _ORDER.index(name) for dtype, name in NAMES.items()}


def planned(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None, path: str
) -> tuple[bytes, list[str]]:
    """Everything before the first tensor, and the names in the order in which the tensors follow: what the safetensors
    package writes, but that metadata keeps its order, which there is a matter of chance.

    Args:
        tensors: name -> (dtype, shape); what :func:`check_name` and :data:`NAMES` have.

    Raises:
        StateDictIOError: no file of that package has so long a header; names ``path``.
    """
    names = sorted(tensors, key=lambda name: (_RANKS[tensors[name][0]], name))
    described: dict[str, Any] = {} if metadata is None else {METADATA: metadata}
    offset = 0
    for name in names:
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * dtype.itemsize
        described[name] = {
            "dtype": NAMES[dtype],
            "shape": _elements(dtype, shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_NBYTES:
        raise StateDictIOError(
            f"{path}: its names and shapes take {len(text)} bytes; the header of a safetensors file has at most "
            f"{MAX_HEADER_NBYTES}: write its tensors into several files"
        )
    return len(text).to_bytes(LENGTH_NBYTES, "little") + text, names


def _elements(dtype: torch.dtype, shape: tuple[int, ...]) -> list[int]:
    """The shape in elements of the format."""
    return [*shape[:-1], shape[-1] * 2] if dtype is PAIRS else [*shape]


def check_name(name: str, path: str) -> None:
    """
    Raises:
        StateDictIOError: no tensor can be called ``name`` in a safetensors file.
    """
    if name == METADATA:
        raise StateDictIOError(
            f"{path}: a tensor is called {name!r}, which is not the name of a tensor in a safetensors file: rename it"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise StateDictIOError(
            f"{path}: the name {name!r} cannot be expressed in UTF-8, as names in a safetensors file are: rename it"
        ) from None
