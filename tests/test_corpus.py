"""The oracle itself: torch.save repeats its bytes for each object of the corpus, so a mismatch elsewhere is ours."""

import pytest
import torch
from corpus import CORPUS
from corpus_case import filled
from corpus_tensors import DENSE_DTYPES
from equality import difference
from oracle import assert_same_bytes, attempt, two_directories

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", CORPUS)
def test_torch_save_repeats_its_bytes(name, tmp_path):
    first, second = (directory / "model.pt" for directory in two_directories(tmp_path))
    obj = CORPUS[name]()
    _, error = attempt(lambda: torch.save(obj, first))
    _, again = attempt(lambda: torch.save(obj, second))
    assert type(error) is type(again)
    if error is None:
        assert_same_bytes(first, second)


def test_every_storage_dtype_of_this_torch_is_in_the_corpus():
    mapped = set(torch.storage._dtype_to_storage_type_map()) | {torch.uint16, torch.uint32, torch.uint64}
    quantized = {dtype for dtype in mapped if str(dtype).startswith("torch.q")}
    assert mapped - quantized <= set(DENSE_DTYPES)


@pytest.mark.parametrize("dtype", [d for d in DENSE_DTYPES if d.itemsize], ids=str)
def test_no_payload_is_all_zeros(dtype):
    data = bytes(filled(64, dtype=dtype).untyped_storage())
    assert len(data) == 64 * dtype.itemsize
    assert data.count(0) < len(data) * 0.9


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (filled(3), filled(3, seed=1)), (filled(3), filled(3).t().clone()[:2]), (1, True), (1, 2), ("a", b"a"), ([1],
        [1, 2]),
        ({"a": 1}, {"b": 1}), ({"a": 1}, {"a": 2}), (torch.nn.Parameter(filled(1)), filled(1)), (0.0, -0.0),
        (torch.empty(2, 3, device="meta"), torch.empty(3, 2, device="meta")), (filled(2).untyped_storage(), filled(2,
        seed=1).untyped_storage()),
    ],
)  # fmt: skip
def test_the_comparison_sees_a_difference(first, second):
    assert difference([first], [second]) is not None
    assert difference([first], [first]) is None
