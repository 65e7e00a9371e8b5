"""A safetensors file, parsed: which tensors are in it, and where. The gate that hostile files have to pass.

What the safetensors package accepts is accepted, within the limits of :mod:`.safetensors_header`: the tensors lie one
behind the other, without gap or overlap, from the header to the end of the file, each as long as its dtype and shape
say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import corrupt
from ..untrusted.limits import SPARE_NBYTES, shown
from .safetensors_header import METADATA, TensorFields, entries

LENGTH_NBYTES = 8
MAX_HEADER_NBYTES = 100_000_000  # as the safetensors package
_MAX_UINT = 1 << 64
_MAX_INT = (1 << 63) - 1
# What a tensor of a header takes here, beside its name.
_TENSOR_NBYTES = 320
#: as the format knows them
_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_ATTRIBUTES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
#: of this torch: not each has every float8
DTYPES = {name: getattr(torch, attribute) for name, attribute in _ATTRIBUTES.items() if hasattr(torch, attribute)}
# Two elements in each.
_PAIRS = {"F4": getattr(torch, "float4_e2m1fn_x2", None)}


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: str  #: as the format calls it
    shape: tuple[int, ...]
    begin: int  #: in the file
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def alignment(self) -> int:
        """That torch wants in memory: of an element, which has 8 bytes at most."""
        return max(_BITS[self.dtype] // 8, 1)

    def in_torch(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Its dtype and shape there.

        Raises:
            ValueError: it has none in this torch; says why.
        """
        if max(self.shape, default=0) > _MAX_INT:
            raise ValueError(f"a shape beyond 2**63: {list(self.shape)}")
        dtype = DTYPES.get(self.dtype)
        if dtype is not None:
            return dtype, self.shape
        dtype = _PAIRS.get(self.dtype)
        if dtype is None:
            raise ValueError(f"dtype {self.dtype}, which this torch lacks")
        if not self.shape or self.shape[-1] % 2:
            raise ValueError(f"dtype {self.dtype}, of which torch holds pairs, and shape {list(self.shape)}")
        return dtype, (*self.shape[:-1], self.shape[-1] // 2)


class SafetensorsFile(NamedTuple):
    tensors: dict[str, StoredTensor]  #: in the order of the file
    metadata: dict[str, str]


def parse(read_at: Callable[[int, int], bytes], file_nbytes: int, path: str) -> SafetensorsFile:
    """
    Args:
        read_at: ``read_at(offset, nbytes)`` gives bytes of the file.

    Raises:
        CorruptCheckpointError: the header is not sound, or does not fit the file.
    """
    if file_nbytes < LENGTH_NBYTES:
        raise corrupt(path, "shorter than the header of a safetensors file")
    nbytes = int.from_bytes(read_at(0, LENGTH_NBYTES), "little")
    if nbytes > min(MAX_HEADER_NBYTES, file_nbytes - LENGTH_NBYTES):
        raise corrupt(path, f"a safetensors header of {nbytes} bytes in a file of {file_nbytes}")
    try:
        return _parsed(read_at(LENGTH_NBYTES, nbytes), file_nbytes)
    except ValueError as e:
        raise corrupt(path, f"its safetensors header is not sound: {e}") from None


def _parsed(header: bytes, file_nbytes: int) -> SafetensorsFile:
    if len(header) < 2:
        raise ValueError(f"it has {len(header)} bytes")
    at = LENGTH_NBYTES + len(header)
    metadata: dict[str, str] | None = None
    found: dict[str, StoredTensor] = {}
    room = SPARE_NBYTES + file_nbytes - len(header)
    for name, fields in entries(header):
        if name in found or (name == METADATA and metadata is not None):
            raise ValueError(f"{shown(name)!r} is there twice")
        if isinstance(fields, dict):
            metadata = fields
            continue
        found[name] = _tensor(name, fields, at)
        room -= _TENSOR_NBYTES + len(name) * (1 if name.isascii() else 4)
        if room < 0:
            raise ValueError(f"more than {len(found)} tensors in a file of {file_nbytes} bytes")
    ordered = found if _are_in_order(found) else dict(sorted(found.items(), key=lambda item: item[1][2:]))
    for name, tensor in ordered.items():
        if tensor.begin != at:
            what = "a gap before" if tensor.begin > at else "another tensor overlaps"
            raise ValueError(f"{what} tensor {shown(name)!r}, which begins at byte {tensor.begin} of the file")
        at = tensor.end
    if at != file_nbytes:
        raise ValueError(f"its tensors end at byte {at}, the file at byte {file_nbytes}")
    return SafetensorsFile(ordered, metadata or {})


def _are_in_order(found: dict[str, StoredTensor]) -> bool:
    last = (0, 0)
    for tensor in found.values():
        if tensor[2:] < last:
            return False
        last = tensor[2:]
    return True


def _tensor(name: str, fields: TensorFields, data_offset: int) -> StoredTensor:
    dtype, shape, begin, end = fields
    bits = _BITS.get(dtype)
    if bits is None:
        raise ValueError(f"tensor {shown(name)!r} has dtype {shown(dtype)!r}, which the format does not have")
    size = 1
    for length in shape:  # as the safetensors package computes it: a 0 comes too late where there is an overflow before
        size *= length
        if size >= _MAX_UINT:
            break
    if size * bits >= _MAX_UINT:
        raise ValueError(f"tensor {shown(name)!r} has 2**64 bits or more by its shape")
    nbytes, rest = divmod(size * bits, 8)
    if rest:
        raise ValueError(f"tensor {shown(name)!r} of dtype {dtype} does not fill whole bytes")
    if end - begin != nbytes:
        raise ValueError(
            f"tensor {shown(name)!r} has {nbytes} bytes by its dtype and shape, {end - begin} by its offsets"
        )
    return StoredTensor(dtype, shape, data_offset + begin, data_offset + end)
