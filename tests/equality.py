"""Deep equality of what torch.load returns: bit patterns, strides, sharing of types; NaN equals itself."""

import collections.abc
import enum

import numpy as np
import torch

_ATOMS = (
    str,
    bytes,
    bytearray,
    int,
    float,
    complex,
    type(None),
    range,
    slice,
    torch.dtype,
    torch.device,
    torch.layout,
    enum.Enum,
)


def storage_bytes(storage):
    untyped = storage._untyped_storage if isinstance(storage, torch.storage.TypedStorage) else storage
    return torch.empty(0, dtype=torch.uint8).set_(untyped).numpy().tobytes()


def _quantizer(tensor):
    try:
        scheme = tensor.qscheme() if tensor.is_quantized else None
    except RuntimeError:
        return ["no quantizer"]
    if scheme == torch.per_tensor_affine:
        return [tensor.q_scale(), tensor.q_zero_point()]
    if scheme is not None:
        return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()]
    return []


def _parts(tensor):
    """What a tensor consists of, as a list of comparable parts."""
    parts = [type(tensor), tensor.dtype, tensor.layout, tensor.device.type, tensor.requires_grad, dict(tensor.__dict__)]
    if torch.nn.parameter.is_lazy(tensor):
        return parts  # it has no shape yet
    if hasattr(tensor, "__tensor_flatten__"):
        return [*parts[:-1], *(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [*parts, tensor.shape, tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [*parts, tensor.shape, tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.layout == torch.sparse_coo:
        return [*parts, tensor.shape, tensor.is_coalesced(), tensor._indices(), tensor._values()]
    if tensor.is_nested:
        return parts + list(tensor.unbind())
    parts += [tensor.shape, tensor.stride(), tensor.storage_offset()]
    parts += _quantizer(tensor)
    if tensor.device.type == "meta":
        return parts
    return [*parts, tensor.is_conj(), tensor.is_neg(), storage_bytes(tensor.untyped_storage())]


def difference(first, second, where="object"):
    """None when equal, else a line that says where they differ. Follows cycles, without recursion."""
    seen, pending = set(), [(first, second, where)]
    while pending:
        a, b, where = pending.pop()
        if (id(a), id(b)) in seen:
            continue
        seen.add((id(a), id(b)))
        if type(a) is not type(b):
            return f"{where}: {type(a)} and {type(b)}"
        if isinstance(a, torch.Tensor):
            pairs = zip(_parts(a), _parts(b), strict=True)
            pending += [(x, y, f"{where}.<part {i}>") for i, (x, y) in enumerate(pairs)]
        elif isinstance(a, torch.storage.TypedStorage | torch.UntypedStorage):
            same = a.device == b.device and a.nbytes() == b.nbytes()
            if not same or (a.device.type != "meta" and storage_bytes(a) != storage_bytes(b)):
                return f"{where}: storages differ"
        elif isinstance(a, np.ndarray | np.generic):
            if a.dtype != b.dtype or a.shape != b.shape or (a.dtype != object and a.tobytes() != b.tobytes()):
                return f"{where}: arrays differ"
        elif isinstance(a, collections.abc.Mapping | list | tuple):
            if len(a) != len(b):
                return f"{where}: lengths {len(a)} and {len(b)}"
            if isinstance(a, collections.abc.Mapping):
                pending += [(x, y, f"{where}.<key {i}>") for i, (x, y) in enumerate(zip(a, b, strict=True))]
                a, b = [*a.values(), getattr(a, "__dict__", None)], [*b.values(), getattr(b, "__dict__", None)]
            pending += [(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))]
        elif isinstance(a, _ATOMS):
            if repr(a) != repr(b):
                return f"{where}: {a!r} and {b!r}"[:300]
        elif (hasattr(a, "__dict__") and not callable(a)) or isinstance(a, torch.nn.Module):
            pending.append((vars(a), vars(b), f"{where}.__dict__"))
    return None
