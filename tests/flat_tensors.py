"""The tensors of an object by name, for comparisons with what open_checkpoint gives."""

import collections

import torch
from corpus_case import filled


def flat(obj, name=""):
    if isinstance(obj, torch.Tensor):
        yield name, obj
    elif isinstance(obj, collections.abc.Mapping | list | tuple):
        items = obj.items() if isinstance(obj, collections.abc.Mapping) else enumerate(obj)
        for key, value in items:
            yield from flat(value, f"{name}.{key}" if name else str(key))


def values_of(tensor, with_strides=True):
    """What can be compared of a tensor that is read alone: not the rest of its storage."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return tensor
    if tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        return tensor
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    flags = [type(tensor), tensor.dtype, tensor.requires_grad, tensor.is_conj(), tensor.is_neg()]
    shape = [tensor.shape, tensor.stride() if with_strides else None]
    return [*flags, *shape, plain.reshape(-1).view(bits) if bits and not plain.dtype.is_complex else plain.reshape(-1)]


def deferred():
    """All in which a tensor is rebuilt by the same call, but for the first of them."""
    base = filled(64, 8, dtype=torch.float32)
    leaf = filled(3, dtype=torch.float32).requires_grad_()
    return {
        "first": filled(2, dtype=torch.float32), "base": base, "rows": base[3:9], "same": base, "t": base.t(),
        "leaf": leaf, "again": [leaf, (leaf,)], "none": torch.empty(0, 3), "ints": filled(7, dtype=torch.int64),
        "odd": base.view(-1)[5:].as_strided((4, 3), (7, 2)),
    }  # fmt: skip
