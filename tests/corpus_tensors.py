"""Plain tensors and storages: dtypes, shapes, views, sharing, layouts, payloads that torch treats specially."""

import numpy as np
import torch
from corpus_case import Corpus, filled, numbers, random_bytes

TENSORS = Corpus()

ALL_DTYPES = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)
QUANTIZED_DTYPES = [torch.quint8, torch.qint8, torch.qint32]


def _viewable(dtype):
    try:
        random_bytes(64).view(dtype)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


# Dtypes that torch.save refuses (int1 ... uint7) stay in: the same error is owed.
DENSE_DTYPES = [dtype for dtype in ALL_DTYPES if dtype == torch.bool or _viewable(dtype)]


@TENSORS.each(DENSE_DTYPES)
def dtype(dtype):
    return {"matrix": filled(6, 8, dtype=dtype), "scalar": filled(1, dtype=dtype, seed=1)[0]}


@TENSORS.each(DENSE_DTYPES)
def dtype_zero_size(dtype):
    return {"empty": torch.empty(0, dtype=dtype), "empty 2d": torch.empty(3, 0, 2, dtype=dtype)}


@TENSORS.each(QUANTIZED_DTYPES)
def quantized_per_tensor(dtype):
    return {"q": torch.quantize_per_tensor(numbers(4, 5), 0.25, 3, dtype)}


@TENSORS.each(QUANTIZED_DTYPES)
def quantized_per_channel(dtype):
    scales, zeros = numbers(4, dtype=torch.float64), torch.arange(4)
    return {"q": torch.quantize_per_channel(numbers(4, 5), scales, zeros, 0, dtype)}


@TENSORS.case
def quantized_sub_byte():
    scales, zeros = numbers(4), numbers(4)
    return torch.quantize_per_channel(numbers(4, 6), scales, zeros, 0, torch.quint4x2)


@TENSORS.case
def quantized_uninitialised():
    return torch.empty(3, dtype=torch.qint8)  # torch.save refuses: no quantizer


@TENSORS.case
def top_level_tensor():
    return filled(3, 5)


@TENSORS.case
def top_level_scalar_tensor():
    return torch.tensor(3.5)


@TENSORS.case
def requires_grad_and_leaf_flags():
    leaf = numbers(3).requires_grad_()
    return {"leaf": leaf, "result": leaf * 2, "detached": leaf.detach()}


@TENSORS.case
def special_floats():
    return torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 5e-324], dtype=torch.float64)


@TENSORS.case
def non_contiguous_views():
    base = filled(8, 6, 4)
    return [base.t() if base.dim() == 2 else base.permute(2, 0, 1), base[::2], base[:, 1:4], base[3], base[..., -1]]


@TENSORS.case
def channels_last():
    return filled(2, 3, 4, 5).to(memory_format=torch.channels_last)


@TENSORS.case
def expanded():
    return {"row": filled(1, 5).expand(1000, 5), "scalar": filled(1).expand(7)}


@TENSORS.case
def overlapping_strides():
    return torch.as_strided(filled(11), (4, 4), (2, 1), 1)


@TENSORS.case
def conjugate_and_negative_views():
    z, other = (torch.complex(numbers(4, 3, seed=seed), numbers(4, 3, seed=seed + 1)) for seed in (0, 2))
    negative = other.conj().imag
    assert z.conj().is_conj() and negative.is_neg()
    return {
        "conj": z.conj(),
        "neg": negative,
        "both": z.conj()._neg_view(),
        "plain": z,
        "half": z.to(torch.complex32).conj(),
    }


@TENSORS.case
def one_storage_under_two_dtypes():
    z = torch.complex(numbers(4), numbers(4, seed=1))
    return {"complex": z, "real": z.real}  # torch.save refuses


@TENSORS.case
def small_view_of_a_huge_storage():
    return {"view": filled(1 << 20)[1000:1003]}


@TENSORS.case
def tied_and_overlapping():
    base, other = filled(64), filled(16, seed=1)
    return {"tied": base, "again": base, "view": base.view(8, 8), "tail": base[32:], "other": other, "head": base[:40]}


@TENSORS.case
def tied_order_is_first_pickled():
    tensors = [filled(4, seed=i) for i in range(12)]
    return [tensors[7], tensors[3], tensors[7][1:], *tensors]


@TENSORS.case
def two_storages_over_the_same_memory():
    array = random_bytes(40).numpy()
    return [torch.from_numpy(array), torch.from_numpy(array)]


@TENSORS.case
def storages_over_overlapping_memory():
    array = random_bytes(400).numpy()
    return [torch.from_numpy(array[8:200]), torch.from_numpy(array[100:])]


@TENSORS.case
def memory_that_torch_does_not_own():
    array = np.frombuffer(random_bytes(4096).numpy().tobytes(), dtype=np.float32).copy()
    return {"numpy": torch.from_numpy(array), "buffer": torch.frombuffer(bytearray(b"some bytes"), dtype=torch.uint8)}


@TENSORS.case
def odd_addresses():
    array = random_bytes(100_000).numpy()
    return [torch.from_numpy(array[i : i + 997 * i]) for i in (1, 3, 7, 13)]


@TENSORS.case
def shared_memory():
    return {"shared": filled(100).share_memory_()}


@TENSORS.case
def storages():
    tensor = filled(12, dtype=torch.int32)
    return {
        "typed": filled(9, dtype=torch.float64).storage(),
        "untyped": random_bytes(33).untyped_storage(),
        "of a tensor": tensor.storage(),
        "tensor": tensor,
        "empty": torch.UntypedStorage(0),
        "bfloat16": filled(5, dtype=torch.bfloat16).storage(),
    }


@TENSORS.case
def top_level_typed_storage():
    return filled(11, dtype=torch.int16).storage()


@TENSORS.case
def top_level_untyped_storage():
    return random_bytes(77).untyped_storage()


@TENSORS.case
def storage_larger_than_its_tensor():
    tensor = filled(4)
    tensor.untyped_storage().resize_(64)
    tensor.set_(tensor.untyped_storage(), 0, (16,)).copy_(filled(16, seed=5))
    return tensor[:2]


@TENSORS.case
def storage_with_a_partial_last_element():
    return torch.empty(0).set_(random_bytes(18).untyped_storage(), 0, (4,))


@TENSORS.each([torch.float32, torch.complex64, torch.int64, torch.bool])
def sparse_coo(dtype):
    indices = torch.tensor([[0, 2, 2, 0], [1, 0, 3, 1]])
    values = filled(4, dtype=dtype)
    return {
        "uncoalesced": torch.sparse_coo_tensor(indices, values, (3, 4)),
        "claimed coalesced": torch.sparse_coo_tensor(indices[:, :3], values[:3], (3, 4), is_coalesced=True),
        "nnz 0": torch.sparse_coo_tensor(torch.empty(2, 0, dtype=torch.int64), values[:0], (3, 4)),
    }


@TENSORS.case
def sparse_coo_coalesced_and_hybrid():
    tensor = torch.sparse_coo_tensor(torch.tensor([[0, 1, 1]]), numbers(3, 2), (4, 2))
    return [tensor.coalesce(), tensor, torch.sparse_coo_tensor((5, 6))]


@TENSORS.each(["csr", "csc", "bsr", "bsc"])
def sparse_compressed(name):
    dense = torch.where(numbers(8, 8, seed=name) > 5, numbers(8, 8), 0)
    blocks = {"blocksize": (2, 4)} if name in ("bsr", "bsc") else {}
    tensor = getattr(dense, f"to_sparse_{name}")(**blocks)
    empty = getattr(torch.zeros(8, 8), f"to_sparse_{name}")(**blocks)
    return {"tensor": tensor, "nnz 0": empty, "half": tensor.to(torch.bfloat16)}


@TENSORS.case
def nested_strided():
    return torch.nested.nested_tensor([numbers(2, 3), numbers(4, 3)], layout=torch.strided)


@TENSORS.case
def nested_jagged():
    return torch.nested.nested_tensor([numbers(2, 3), numbers(4, 3)], layout=torch.jagged)


@TENSORS.case
def meta():
    tensor = torch.empty(1000, 1000, device="meta")
    return {"meta": tensor, "view": tensor[1:], "parameter": torch.nn.Parameter(tensor), "real": filled(3)}


@TENSORS.case
def many_small():
    return {f"layer.{i}.weight": filled(i % 7 + 1, seed=i) for i in range(2000)}


@TENSORS.case
def around_the_alignment():
    return [filled(n, dtype=torch.uint8, seed=n) for n in (1, 2, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097)]


@TENSORS.case
def larger_than_one_region():
    """Several records over and around 8 MiB, a likely size of a writer's buffer."""
    sizes = [(8 << 20) - 700, 1, (8 << 20) + 1, 5, 4096, 3]
    return {f"{i}": filled(size, dtype=torch.uint8, seed=i) for i, size in enumerate(sizes)}


def starting_with_a_descriptor_signature(nbytes, seed=0):
    """torch takes a written block of 8 bytes or more that starts so for a data descriptor and folds the
    four bytes that follow into the serialization id."""
    payload = random_bytes(nbytes, seed)
    payload[:4] = torch.tensor(list(b"PK\x07\x08"), dtype=torch.uint8)[:nbytes]
    return payload


@TENSORS.each([0, 3, 4, 5, 7, 8, 9, 12, 16, 63, 64, 65, 5000, 9 << 20])
def payload_like_a_descriptor(nbytes):
    return {"before": filled(3), "it": starting_with_a_descriptor_signature(nbytes), "after": filled(3, seed=1)}


@TENSORS.case
def payloads_like_descriptors():
    return [starting_with_a_descriptor_signature(n, seed=n) for n in (8, 0, 4, 64, 7, 9, 4096, 100)]


@TENSORS.case
def descriptor_signatures_inside_a_payload():
    """Only the start of a record counts: not the start of a writer's block, wherever it falls."""
    payload = random_bytes(9 << 20).view(-1, 64)
    payload[1:, :4] = torch.tensor(list(b"PK\x07\x08"), dtype=torch.uint8)
    return payload.view(-1)


@TENSORS.case
def payloads_like_other_zip_signatures():
    return [
        torch.frombuffer(bytearray(s * 9), dtype=torch.uint8) for s in (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06")
    ]
