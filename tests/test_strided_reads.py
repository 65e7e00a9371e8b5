"""Views of a record, read into tensors of any layout, against the views themselves; and how much is read for them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statedict_io.reading.lazy import strided_reads
from statedict_io.reading.lazy.strided_reads import fills, memory_of


class Record:
    """The bytes of a tensor's storage, and how they were read."""

    def __init__(self, tensor):
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        self.data = bytes(memory_of(whole))
        self.num_bytes = self.num_reads = 0

    def read(self, offset, destination, num_rows=1, pitch=0):
        row_nbytes = destination.nbytes // num_rows
        for row in range(num_rows):
            start = offset + row * pitch
            assert 0 <= start <= start + row_nbytes <= len(self.data)
            destination[row * row_nbytes : (row + 1) * row_nbytes] = self.data[start : start + row_nbytes]
        self.num_bytes += destination.nbytes
        self.num_reads += num_rows


def fill(target, view, read, **options):
    for rows in fills(target, view.storage_offset(), view.stride(), **options):
        read(*rows)


@st.composite
def views(draw):
    """A view by narrowing, steps, permuting, expanding, and now and then overlapping windows."""
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
    shape = draw(st.lists(st.integers(1, 9), min_size=0, max_size=4))
    view = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    for dim, size in enumerate(shape):
        begin = draw(st.integers(0, size - 1))
        step = draw(st.integers(1, 3))
        view = view[(slice(None),) * dim + (slice(begin, draw(st.integers(begin, size)), step),)]
    view = view.permute(draw(st.permutations(range(view.dim()))))
    if draw(st.booleans()):
        view = view.unsqueeze(0).expand(draw(st.integers(0, 3)), *view.shape)
    if view.dim() and view.shape[-1] > 2 and draw(st.booleans()):
        view = view.unfold(view.dim() - 1, 2, 1)
    return view


@settings(deadline=None)
@given(
    views(),
    st.randoms(use_true_random=False),
    st.sampled_from([0, 64, 4096]),
    st.sampled_from([1, 2]),
    st.sampled_from([16, 200, 16 << 20]),
)
def test_what_is_filled_is_the_view(view, rng, cheap_nbytes, max_overhead, tile_nbytes):
    record = Record(view)
    order = list(range(view.dim()))
    rng.shuffle(order)
    inverse = [order.index(dim) for dim in range(view.dim())]
    targets = [torch.full(view.shape, 77, dtype=view.dtype)]
    targets.append(torch.full([view.shape[dim] for dim in order], 77, dtype=view.dtype).permute(inverse))
    targets.append(
        torch.full([2 * size for size in view.shape], 77, dtype=view.dtype)[(slice(None, None, 2),) * view.dim()]
    )
    before, strided_reads._MAX_TILE_NBYTES = strided_reads._MAX_TILE_NBYTES, tile_nbytes
    try:
        for target in targets:
            fill(target, view, record.read, cheap_nbytes=cheap_nbytes, max_overhead=max_overhead)
            assert torch.equal(target, view)
    finally:
        strided_reads._MAX_TILE_NBYTES = before


def amounts(view, *, max_overhead):
    record = Record(view)
    target = torch.empty(view.shape, dtype=view.dtype)
    fill(target, view, record.read, cheap_nbytes=4096, max_overhead=max_overhead)
    assert torch.equal(target, view)
    return record.num_bytes / target.nbytes, record.num_reads


def test_how_much_is_read():
    matrix = torch.arange(512 * 4096, dtype=torch.int32).reshape(512, 4096)
    assert amounts(matrix[100:200], max_overhead=1) == (1, 1)
    assert amounts(matrix[:, 1024:2048], max_overhead=1) == (1, 512)  # columns of a shard
    assert amounts(matrix[:, 1024:2048], max_overhead=2) == (1, 512)
    ratio, num_reads = amounts(matrix[:, :2048], max_overhead=2)
    assert ratio <= 2 and num_reads == 1
    assert amounts(matrix[:, :2048], max_overhead=1) == (1, 512)
    ratio, num_reads = amounts(matrix[:, ::4], max_overhead=1)  # not a read for each element
    assert ratio <= 4.01 and num_reads == 1
    assert amounts(matrix.t(), max_overhead=1) == (1, 1)
    assert amounts(matrix[:1].expand(300, 4096), max_overhead=1)[1] == 1
