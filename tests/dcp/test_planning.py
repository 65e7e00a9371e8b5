"""The pure parts: ranges of shards as strips, who writes which range, structure; strips against a plain description."""

import contextlib
import itertools
import os
import pickle
import random
import zipfile
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.serialization import config

from statedict_io import backends
from statedict_io.archive import crc32
from statedict_io.backends.protocol import Strip
from statedict_io.dcp.archive_frame import ArchiveFrame
from statedict_io.dcp.assignment import Shard, assign_ranges
from statedict_io.dcp.range_writer import contiguous_ranges
from statedict_io.dcp.strips import strips_of_range
from statedict_io.dcp.structure import TensorEntry, pickle_structure
from statedict_io.names.nested_state import nested
from statedict_io.pickles import pickling

dimensions = st.lists(st.integers(1, 5), min_size=0, max_size=4)


@st.composite
def ranges_of_shards(draw):
    shape = draw(dimensions)
    offsets = [draw(st.integers(0, size - 1)) for size in shape]
    sizes = [draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True)]
    numel = torch.Size(sizes).numel()
    begin = draw(st.integers(0, numel))
    return shape, offsets, sizes, begin, draw(st.integers(begin, numel))


def taken(file, strips):
    return b"".join(
        file[strip.file_offset + i * strip.file_pitch :][: strip.row_nbytes]
        for strip in strips
        for i in range(strip.num_rows)
    )


@given(ranges_of_shards(), st.sampled_from([torch.uint8, torch.int16, torch.complex128]))
def test_strips_of_a_range_are_its_elements(drawn, dtype):
    shape, offsets, sizes, begin, end = drawn
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    part = tensor
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        part = part.narrow(dim, offset, size)
    places = {"source": 3, "source_offset": 40, "payload_offset": 7}
    strips = list(strips_of_range(shape, offsets, sizes, tensor.itemsize, begin, end, **places))
    assert taken(bytes(7) + as_bytes(tensor), strips) == as_bytes(part.reshape(-1)[begin:end])
    assert len(strips) <= 3 * max(1, torch.Size(sizes[:-2]).numel())
    position = 40
    for strip in strips:
        assert (strip.source, strip.source_offset) == (3, position)
        position += strip.row_nbytes * strip.num_rows
        last = strip.file_offset + (strip.num_rows - 1) * strip.file_pitch + strip.row_nbytes
        assert strip.nbytes_after == 7 + tensor.nbytes - last


@given(dimensions, st.randoms(use_true_random=False), st.integers(1, 200))
def test_contiguous_ranges_of_a_tensor_are_its_elements(shape, rng, limit):
    order = list(range(len(shape)))
    rng.shuffle(order)
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape).permute(order)
    begin = rng.randint(0, tensor.numel())
    end = rng.randint(begin, tensor.numel())
    found = []
    for part in contiguous_ranges(tensor, begin, end, limit):
        if part.tensor.untyped_storage()._cdata != tensor.untyped_storage()._cdata:
            assert part.tensor.nbytes <= max(limit, 4)
        count = part.end - part.begin
        found += part.tensor.reshape(-1)[part.first : part.first + count].tolist()
    assert found == tensor.reshape(-1)[begin:end].tolist()


def as_bytes(tensor):
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return bytes(flat.view(torch.uint8).tolist())


# --- who writes which range


def loads_of(shards, num_ranks):
    loads = [0] * num_ranks
    for shard, ranges in zip(shards, assign_ranges(shards, num_ranks), strict=True):
        position = 0
        for each in sorted(ranges, key=lambda each: each.begin):
            assert each.begin == position and each.rank in shard.holders
            position = each.end
            loads[each.rank] += (each.end - each.begin) * shard.itemsize
        assert position == shard.numel
    return loads


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 50_000), st.sampled_from([1, 2, 4, 8]), st.integers(0, 63)), max_size=30),
)
def test_ranges_cover_each_shard_once(num_ranks, drawn):
    shards = []
    for numel, itemsize, mask in drawn:
        holders = tuple(rank for rank in range(num_ranks) if mask >> rank & 1) or (0,)
        shards.append(Shard(numel, itemsize, 64 * len(shards), holders))
    loads_of(shards, num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 7])
def test_replicas_are_shared_out_evenly(num_ranks):
    everyone = tuple(range(num_ranks))
    one_big = [Shard(10_000_000, 4, 1000, everyone)]
    layers = [Shard(numel, 2, 64, everyone) for _ in range(12) for numel in (512 * 2048, 2048, 2048, 100)]
    uneven = [Shard(900_000, 4, 0, (0,)), *layers]  # one rank has more to begin with
    hybrid = [Shard(1 << 20, 2, 0, (rank, rank + num_ranks)) for rank in range(num_ranks)]
    for shards, ranks in ((one_big, num_ranks), (layers, num_ranks), (uneven, num_ranks), (hybrid, 2 * num_ranks)):
        loads = loads_of(shards, ranks)
        assert max(loads) <= 1.1 * sum(loads) / ranks, loads


def test_small_replicas_are_not_cut():
    shards = [Shard(5056, 1, 64 * i, (0, 1, 2)) for i in range(40)]  # as states of random number generators
    assert all(len(ranges) == 1 for ranges in assign_ranges(shards, 3))


# --- structure


def test_structure_is_pickled_as_the_gathered_state():
    def state(make):
        return {
            "model": {f"layer{i}": make((3, i), torch.float16) for i in range(12)},
            "storage": make((), torch.int64),
            "cpu": [make((2,), torch.float8_e5m2), {"x": make((0, 3), torch.bool)}],
            "lr": 0.1,
        }

    ours = pickle_structure(state(TensorEntry))
    theirs = pickling.pickle_object(state(lambda shape, dtype: torch.zeros(shape, dtype=dtype)), pickle, 2)
    assert ours.data_pkl == theirs.data_pkl
    assert [entry.nbytes for entry in ours.entries] == [storage.nbytes() for storage in theirs.table.storages]


def test_nested_undoes_flattening():
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    state = {"a": {"b": 1, "c": [torch.ones(1), {"d": 2}]}, "e": 3}
    flat, paths = flatten_state_dict(state)
    assert nested(flat.items(), paths) == state


# --- strips


def random_strips(rng, file_nbytes):
    """Strips that tile a part of a file without overlap: rows between rows of others."""
    strips, sources, offset = [], [], rng.randrange(5000)
    while offset < file_nbytes:
        row = rng.choice([1, 3, 100, 4096, 70_000, 200_000])
        pitch = row + rng.choice([0, 1, 64, 4096, 100_000])
        count = rng.choice([1, 2, 5])
        if offset + pitch * count > file_nbytes:
            break
        data = rng.randbytes(row * count + 7)
        sources.append(data)
        strips.append(Strip(len(sources) - 1, rng.randrange(8), offset, row, count, pitch, rng.randrange(1 << 40)))
        offset += pitch * count + rng.choice([0, 0, 5, 4096])
    rng.shuffle(strips)
    return sources, strips


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("durable", [True, False])
def test_strips_land_where_they_belong(tmp_path, backend, seed, durable):
    rng = random.Random(seed)
    file_nbytes = rng.choice([100_000, 3_000_000, 20_000_000])
    sources, strips = random_strips(rng, file_nbytes)
    path = tmp_path / "file"
    before = rng.randbytes(file_nbytes)  # what others wrote must stay
    path.write_bytes(before)
    done = []
    storages = [torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage() for data in sources]
    results = backends.choose(backend).write_strips(
        str(path), storages, strips, durable=durable, compute_crc32=True, progress=lambda *at: done.append(at)
    )
    expected = bytearray(before)
    for strip, (crc, first_bytes) in zip(strips, results, strict=True):
        source = sources[strip.source][strip.source_offset :]
        pieces = 0
        for row in range(strip.num_rows):
            line = source[row * strip.row_nbytes : (row + 1) * strip.row_nbytes]
            at = strip.file_offset + row * strip.file_pitch
            expected[at : at + len(line)] = line
            after = (strip.num_rows - 1 - row) * strip.file_pitch + strip.nbytes_after
            pieces ^= crc32.shift(zlib.crc32(line), after)
        assert first_bytes == source[: min(8, strip.row_nbytes * strip.num_rows)]
        assert crc == pieces
    assert path.read_bytes() == bytes(expected)
    assert done[-1] == (sum(s.row_nbytes * s.num_rows for s in strips),) * 2


def test_crc_of_a_record_is_the_xor_of_its_pieces():
    rng = random.Random(1)
    data = rng.randbytes(10_000)
    cuts = sorted([0, len(data), *(rng.randrange(len(data)) for _ in range(20))])
    total = 0
    for begin, end in itertools.pairwise(cuts):
        total ^= crc32.shift(zlib.crc32(data[begin:end]), len(data) - end)
    assert total == zlib.crc32(data)
    tables = crc32.shifter(12345)
    assert crc32.shift_by(tables, 0xDEADBEEF) == crc32.shift(0xDEADBEEF, 12345)


def test_system_errors_carry_the_path(tmp_path, backend):
    with pytest.raises(FileNotFoundError) as raised:
        backends.choose(backend).write_strips(
            str(tmp_path / "no"), [], [], durable=True, compute_crc32=True, progress=None
        )
    assert raised.value.filename == str(tmp_path / "no")


# --- the frame


@contextlib.contextmanager
def alignment_of(nbytes):
    before = config.save.storage_alignment
    config.save.storage_alignment = nbytes
    try:
        yield
    finally:
        config.save.storage_alignment = before


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.binary(max_size=20), st.just(b"PK\x07\x08abcdef")), max_size=8),
    st.sampled_from([1, 64, 4096]),
)
def test_frame_and_payloads_make_up_an_archive_of_torch(tmp_path_factory, payloads, alignment):
    """Also payloads that look like data descriptors, which the serialization id depends on."""
    path = tmp_path_factory.mktemp("frame") / "x.pt"
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0) for data in payloads]
    with alignment_of(alignment):
        torch.save(tensors, path)
    expected = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = [(name[2:], archive.read(name)) for name in archive.namelist()]
    first = next((i for i, (name, _) in enumerate(records) if name.startswith("data/")), len(records) - 2)
    head, tail = records[:first], [r for r in records[first:-1] if not r[0].startswith("data/")]
    frame = ArchiveFrame("x", head, [len(data) for data in payloads], tail, alignment)
    path.write_bytes(b"\xff" * frame.nbytes)
    fd = os.open(path, os.O_RDWR)
    try:
        for record, data in zip(frame.storages(), payloads, strict=True):
            os.pwrite(fd, data, record.payload_offset)
        starts = {key: data[:8] for key, data in enumerate(payloads) if len(data) >= 8}
        frame.write(fd, [zlib.crc32(data) for data in payloads], starts, compute_crc32=True)
    finally:
        os.close(fd)
    assert path.read_bytes() == expected
