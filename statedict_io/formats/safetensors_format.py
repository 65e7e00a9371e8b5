"""The safetensors format: eight bytes of header length, a JSON header, the tensors one after the other.

Written here and not by the ``safetensors`` package because that takes whole tensors: neither its ``save_file`` nor its
``serialize_file`` can be fed piece by piece. https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import StateDictIOError
from .safetensors_header import METADATA
from .safetensors_parsed import DTYPES, LENGTH_NBYTES, MAX_HEADER_NBYTES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def in_order(tensors: Iterable[tuple[str, torch.dtype]]) -> list[str]:
    """The order in which the safetensors package writes them: no tensor needs padding."""
    return [name for name, _ in sorted(tensors, key=lambda pair: (-pair[1].itemsize, pair[0]))]


def header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Everything before the first tensor; ``tensors`` in file order."""
    described: dict[str, Any] = {METADATA: metadata} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        described[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_NBYTES, "little") + text


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


def check_header(header: bytes, path: str) -> None:
    """
    Raises:
        StateDictIOError: the safetensors package would not read a file that begins so.
    """
    if len(header) - LENGTH_NBYTES > MAX_HEADER_NBYTES:
        raise StateDictIOError(
            f"{path}: its names and shapes take {len(header)} bytes; the header of a safetensors file has at most "
            f"{MAX_HEADER_NBYTES}: convert its parts one by one"
        )
