"""Byte identity for objects that nobody thought of: nested containers of tensors of every dtype, layout and sharing."""

import collections
import dataclasses
import pathlib
import tempfile

import pytest
import torch
from corpus_case import filled
from corpus_tensors import DENSE_DTYPES, starting_with_a_descriptor_signature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_same_file, attempt

pytestmark = pytest.mark.filterwarnings("ignore")

COMPUTABLE = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
QUIET = {
    "deadline": None,
    "print_blob": True,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}


def _savable(dtype):
    with tempfile.TemporaryDirectory() as directory:
        return attempt(lambda: torch.save(filled(2, dtype=dtype), f"{directory}/x"))[1] is None


SAVABLE = [dtype for dtype in DENSE_DTYPES if _savable(dtype)]

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(-(2**2100), 2**2100) | st.floats() | st.complex_numbers()
    | st.text(st.characters()) | st.binary() | st.sampled_from([torch.float32, torch.Size([1, 2]), torch.device("cpu")])
)  # fmt: skip
KEYS = st.text(max_size=20) | st.integers() | st.tuples(st.integers(), st.text(max_size=3)) | st.booleans() | st.none()
SHAPES = st.lists(st.integers(0, 12), max_size=3) | st.lists(st.integers(1, 3000), min_size=1, max_size=1)


@st.composite
def base_tensors(draw):
    seed = draw(st.integers(0, 1 << 20))
    if draw(st.integers(0, 15)) == 0:
        return starting_with_a_descriptor_signature(draw(st.integers(0, 40)), seed)
    return filled(*draw(SHAPES), dtype=draw(st.sampled_from(SAVABLE)), seed=seed)


OPERATIONS = ["slice", "step", "transpose", "expand", "select", "flatten", "conj", "neg", "parameter"]
SHARED = st.builds(
    lambda index, operations, kind: Shared(index, operations, kind),
    st.integers(0, 99),
    st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 12), st.integers(0, 12)), max_size=3),
    st.sampled_from(["tensor", "tensor", "tensor", "typed storage"]),
)


@dataclasses.dataclass(frozen=True)
class Shared:
    """Stands for a tensor of the pool, or a view or the storage of one, until the pool is drawn."""

    index: int
    operations: list
    kind: str

    def resolve(self, pool):
        base = pool[self.index % len(pool)]
        return base.storage() if self.kind == "typed storage" else view(base, self.operations)


def view(tensor, operations):
    """Another view of the tensor's storage, under the same dtype; operations that don't fit are left out."""
    for operation, i, j in operations:
        if operation == "slice" and tensor.dim():
            tensor = tensor[min(i, tensor.shape[0]) :][: j + 1]
        elif operation == "step" and tensor.dim():
            tensor = tensor[:: i + 1]
        elif operation == "transpose" and tensor.dim() > 1:
            tensor = tensor.transpose(0, -1)
        elif operation == "expand":
            tensor = tensor.unsqueeze(0).expand(i, *tensor.shape)
        elif operation == "select" and tensor.dim() and tensor.shape[0]:
            tensor = tensor[i % tensor.shape[0]]
        elif operation == "flatten" and tensor.is_contiguous():
            tensor = tensor.view(-1)
        elif operation == "conj" and tensor.dtype.is_complex:
            tensor = tensor.conj()
        elif operation == "neg" and tensor.dtype in (torch.float32, torch.float64, torch.complex64):
            tensor = tensor._neg_view()
        elif operation == "parameter":
            tensor = torch.nn.Parameter(tensor.detach(), requires_grad=tensor.dtype == torch.float32 and i % 2 == 0)
    return tensor


@st.composite
def sparse_tensors(draw):
    rows, columns, nnz = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 12))
    dtype, seed = draw(st.sampled_from(COMPUTABLE)), draw(st.integers(0, 1 << 20))
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randint(0, size, (nnz,), generator=generator) for size in (rows, columns)])
    tensor = torch.sparse_coo_tensor(indices, filled(nnz, dtype=dtype, seed=seed), (rows, columns))
    layout = draw(st.sampled_from(["coo", "coalesced", "csr", "csc"]))
    if layout == "coo":
        return tensor
    if layout == "coalesced":
        return tensor.coalesce()
    dense = filled(rows, columns, dtype=torch.float32, seed=seed).nan_to_num(0).to(dtype)
    return dense.to_sparse_csr() if layout == "csr" else dense.to_sparse_csc()


UNTYPED = st.builds(
    lambda n, seed: filled(n, dtype=torch.uint8, seed=seed).untyped_storage(), st.integers(0, 50), st.integers(0, 99)
)


def containers(children):
    mappings = st.dictionaries(KEYS, children, max_size=6)
    return (
        st.lists(children, max_size=6) | st.lists(children, max_size=5).map(tuple) | mappings
        | mappings.map(collections.OrderedDict) | children.map(lambda child: [child, child])
        | st.dictionaries(st.text(max_size=9), SHARED)
    )  # fmt: skip


STRUCTURES = st.recursive(SCALARS | SHARED | SHARED | sparse_tensors() | UNTYPED, containers, max_leaves=25)


def resolved(node, pool):
    if isinstance(node, Shared):
        return node.resolve(pool)
    if isinstance(node, dict):
        return type(node)((key, resolved(value, pool)) for key, value in node.items())
    if type(node) in (list, tuple):
        return type(node)(resolved(child, pool) for child in node)
    return node


@st.composite
def objects(draw):
    pool = draw(st.lists(base_tensors(), min_size=1, max_size=5))
    return Drawn(resolved(draw(STRUCTURES), pool))


class Drawn:
    """An object under a repr that can't fail and doesn't compute."""

    def __init__(self, obj):
        self.obj = obj

    def __repr__(self):
        return f"<{shown(self.obj)}>"


def shown(obj):
    if isinstance(obj, torch.Tensor):
        return f"{type(obj).__name__}({obj.dtype}, {tuple(obj.shape)}, {obj.layout})"
    if isinstance(obj, dict):
        return "{" + ", ".join(f"{key!r}: {shown(value)}" for key, value in obj.items()) + "}"
    if isinstance(obj, list | tuple):
        return "[" + ", ".join(map(shown, obj)) + "]"
    return f"{type(obj).__name__}({len(obj)} bytes)" if torch.is_storage(obj) else repr(obj)


def check(drawn, backend, **options):
    obj = drawn.obj
    with tempfile.TemporaryDirectory() as directory:
        assert_same_file(pathlib.Path(directory), obj, backend, **options)


@settings(max_examples=60, **QUIET)
@given(drawn=objects())
def test_random_objects(backend, drawn):
    check(drawn, backend, load=False)


@settings(max_examples=30, **QUIET)
@given(
    drawn=objects(),
    protocol=st.integers(2, 5),
    name=st.text(st.characters(exclude_characters="/\\\0", exclude_categories=["Cs"]), min_size=1, max_size=30),
)
def test_random_names_and_protocols(backend, drawn, protocol, name):
    check(drawn, backend, name=name, pickle_protocol=protocol, load=False, durable=(False,))


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=2000, **QUIET)
@given(drawn=objects(), protocol=st.sampled_from([2, 2, 2, 3, 4, 5]))
def test_many_random_objects(backend, drawn, protocol):
    check(drawn, backend, pickle_protocol=protocol)
