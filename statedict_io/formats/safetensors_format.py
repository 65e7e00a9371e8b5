"""The safetensors format: eight bytes of header length, a JSON header, the tensors one after the other.

Written here and not by the ``safetensors`` package because that takes whole tensors: neither its ``save_file`` nor its
``serialize_file`` can be fed piece by piece. https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ..errors import StateDictIOError, corrupt
from ..untrusted.limits import shown
from .safetensors_header import METADATA, entries

_LENGTH_NBYTES = 8
_MAX_HEADER_NBYTES = 100_000_000  # as the safetensors package
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
#: of this torch: not each has every float8
DTYPES = {name: getattr(torch, attribute) for name, attribute in _DTYPES.items() if hasattr(torch, attribute)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StoredTensor(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  #: in the file
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


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
    return len(text).to_bytes(_LENGTH_NBYTES, "little") + text


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
    if len(header) - _LENGTH_NBYTES > _MAX_HEADER_NBYTES:
        raise StateDictIOError(
            f"{path}: its names and shapes take {len(header)} bytes; the header of a safetensors file has at most "
            f"{_MAX_HEADER_NBYTES}: convert its parts one by one"
        )


def parse(read_at: Any, file_nbytes: int, path: str) -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors in file order, and the metadata.

    Args:
        read_at: ``read_at(offset, nbytes)`` gives bytes of the file.

    Raises:
        CorruptCheckpointError: the header is not sound.
    """
    if file_nbytes < _LENGTH_NBYTES:
        raise corrupt(path, "shorter than the header of a safetensors file")
    nbytes = int.from_bytes(read_at(0, _LENGTH_NBYTES), "little")
    if nbytes > min(_MAX_HEADER_NBYTES, file_nbytes - _LENGTH_NBYTES):
        raise corrupt(path, f"a safetensors header of {nbytes} bytes in a file of {file_nbytes}")
    metadata: dict[str, str] | None = None
    found: dict[str, StoredTensor] = {}
    try:
        for name, fields in entries(read_at(_LENGTH_NBYTES, nbytes)):
            if name in found or (name == METADATA and metadata is not None):
                raise ValueError(f"{shown(name)!r} is there twice")
            if name == METADATA:
                metadata = fields
            else:
                found[name] = _tensor(name, fields, _LENGTH_NBYTES + nbytes)
    except ValueError as e:
        raise corrupt(path, f"its safetensors header cannot be read: {e}") from None
    tensors = [*found.values()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    at = _LENGTH_NBYTES + nbytes
    for tensor in tensors:
        if tensor.begin != at or tensor.nbytes != math.prod(tensor.shape) * tensor.dtype.itemsize:
            raise corrupt(path, f"the offsets of tensor {shown(tensor.name)!r} do not fit its shape or its neighbours")
        at = tensor.end
    if at != file_nbytes:
        raise corrupt(path, f"its tensors end at byte {at}, the file at byte {file_nbytes}")
    return tensors, metadata or {}


def _tensor(name: str, fields: dict[str, Any], data_offset: int) -> StoredTensor:
    offsets, shape, dtype_name = (
        _lengths(fields.get("data_offsets")),
        _lengths(fields.get("shape")),
        fields.get("dtype"),
    )
    if offsets is None or len(offsets) != 2 or shape is None:
        raise ValueError(f"tensor {shown(name)!r} has no offsets or no shape")
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        dtype_shown = shown(dtype_name) if isinstance(dtype_name, str) else None
        raise ValueError(f"tensor {shown(name)!r} has dtype {dtype_shown!r}, which this torch does not know")
    return StoredTensor(name, dtype, shape, data_offset + offsets[0], data_offset + offsets[1])


def _lengths(value: Any) -> tuple[int, ...] | None:
    """None: it is no list of integers that are not negative and fit 63 bits."""
    if isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value):
        return tuple(value)
    return None
