"""An object that many ranks send: who sends what, and that it is the file that one rank writes."""

import io
import itertools
import threading
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statedict_io.backends.protocol import Strip
from statedict_io.backends.strip_copies import copy_strip
from statedict_io.dcp import own_parts
from statedict_io.dcp.parts import Extent, Gap, cut, owners
from statedict_io.dcp.strips import position_of, strips_of_at_most, strips_until

from . import threads

KIB = 1 << 10

# --- where the cuts are


@st.composite
def files(draw):
    """(extents, gaps, end): records behind each other, with gaps between, each of one rank, of several, or in rows."""
    extents, gaps, offset = [], [], 0
    for _ in range(draw(st.integers(0, 12))):
        gap = draw(st.integers(1, 300))
        gaps.append(Gap(offset, offset + gap))
        offset += gap
        nbytes = draw(st.sampled_from([0, 1, 100, 1_000, 5_000, 40_000])) + draw(st.integers(0, 50))
        ranks = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
        if draw(st.booleans()):
            extents += [Extent(offset, offset + nbytes, rank, nbytes // len(ranks)) for rank in ranks if nbytes]
        else:
            ends = [nbytes * i // len(ranks) for i in range(len(ranks) + 1)]
            extents += [
                Extent(offset + a, offset + b, rank, b - a)
                for rank, (a, b) in zip(ranks, itertools.pairwise(ends), strict=True)
                if b > a
            ]
        offset += nbytes
    gaps.append(Gap(offset, offset + 16))
    return sorted(extents), gaps, offset + 16


@given(files(), st.integers(400, 3_000), st.integers(400, 10_000))
def test_parts_are_large_enough_and_cut_nothing_between_payloads(file, least, nbytes):
    extents, gaps, end = file
    cuts = list(cut(extents, gaps, end, least_nbytes=least, nbytes=nbytes))
    assert cuts[0] == 0 and cuts == sorted(set(cuts))
    assert cuts[-1] == (end if end >= least else 0)
    sizes = [b - a for a, b in itertools.pairwise(cuts)]
    assert all(size >= least for size in sizes)
    assert all(size <= 2 * max(nbytes, 1.5 * least) + 2 * 300 + least for size in sizes)
    assert not [(gap, c) for gap in gaps for c in cuts if gap.begin < c < gap.end]
    found = owners(cuts, extents, 5)
    assert len(found) == len(sizes)
    for part, owner in enumerate(found):
        share = shares(extents, cuts[part], cuts[part + 1])
        assert not share or 2 * share.get(owner, 0) + 2 * len(extents) >= max(share.values())


def shares(extents, begin, end):
    found = {}
    for extent in extents:
        overlap = max(min(extent.end, end) - max(extent.begin, begin), 0)
        if overlap:
            found[extent.rank] = found.get(extent.rank, 0) + overlap * extent.nbytes // (extent.end - extent.begin)
    return found


def test_large_shards_make_parts_of_one_rank_each():
    """Two ranks, each with half of every tensor: nothing has to be sent to another rank."""
    extents, gaps, offset = [], [], 0
    for _ in range(20):
        gaps.append(Gap(offset, offset + 144))
        offset += 144
        extents += [Extent(offset, offset + 9_000, 0, 9_000), Extent(offset + 9_000, offset + 18_000, 1, 9_000)]
        offset += 18_000
    gaps.append(Gap(offset, offset + 16))
    cuts = cut(extents, gaps, offset + 16, least_nbytes=1_000, nbytes=2_000)
    found = owners(cuts, extents, 2)
    for part in range(len(found)):
        assert len(shares(extents, cuts[part], cuts[part + 1])) == 1
    loads = [sum(cuts[p + 1] - cuts[p] for p, owner in enumerate(found) if owner == rank) for rank in (0, 1)]
    assert max(loads) <= 1.02 * min(loads)


def test_small_shards_are_dealt_out_evenly():
    """64 ranks, some 100 bytes each of every tensor: a part has bytes of many, and each rank sends its share."""
    sizes = [98 + i % 64 % 5 for i in range(64 * 200)]
    ends = list(itertools.accumulate(sizes))
    extents = [Extent(end - size, end, i % 64, size) for i, (size, end) in enumerate(zip(sizes, ends, strict=True))]
    cuts = cut(extents, [], ends[-1], least_nbytes=1_000, nbytes=2_000)
    found = owners(cuts, extents, 64)
    loads = [sum(cuts[p + 1] - cuts[p] for p, owner in enumerate(found) if owner == rank) for rank in range(64)]
    assert max(loads) <= 1.15 * sum(loads) / 64


def test_an_object_of_terabytes_has_no_more_parts_than_a_store_takes():
    end = 4 << 40
    extents = [Extent(end * i // 512, end * (i + 1) // 512, i, end // 512) for i in range(512)]
    assert len(cut(extents, [], end, least_nbytes=5 << 20, nbytes=16 << 20)) <= 9_001


# --- rows


rows = st.builds(
    lambda row, extra, num, offset: Strip(0, 0, offset, row, num, row + extra, 0),
    st.integers(1, 30),
    st.integers(0, 30),
    st.integers(1, 6),
    st.integers(0, 50),
)


def places(*strips):
    """(place in the file, place in memory) of each byte."""
    return [
        (strip.file_offset + i * strip.file_pitch + j, strip.source_offset + i * strip.row_nbytes + j)
        for strip in strips
        for i in range(strip.num_rows)
        for j in range(strip.row_nbytes)
    ]


@given(rows, st.integers(0, 400))
def test_a_strip_is_cut_at_an_offset(strip, offset):
    taken, left = strips_until(strip, offset)
    assert places(*taken, *left) == places(strip)
    assert all(place < offset for each in taken for place, _ in places(each))
    assert all(place >= offset for each in left for place, _ in places(each))


@given(rows, st.integers(1, 80))
def test_a_strip_in_small_pieces(strip, nbytes):
    pieces = list(strips_of_at_most(strip, nbytes))
    assert places(*pieces) == places(strip)
    assert all(piece.row_nbytes * piece.num_rows <= nbytes for piece in pieces)


@given(rows, st.integers(0, 400), st.integers(0, 9))
def test_pieces_of_a_strip_add_up_to_the_crc_of_the_record(strip, offset, behind):
    """And lie in memory where they are to, at whatever pitch."""
    last = strip.file_offset + (strip.num_rows - 1) * strip.file_pitch + strip.row_nbytes
    strip = strip._replace(nbytes_after=behind)
    source = torch.arange(strip.row_nbytes * strip.num_rows, dtype=torch.int16).mul(37).to(torch.uint8)
    record = bytearray(last + behind)
    for place, at in places(strip):
        record[place] = source[at]
    taken, left = strips_until(strip, offset)
    found, file = 0, bytearray(len(record))
    for each in taken:
        crc, first = copy_strip(
            memoryview(file), each.file_offset, each.file_pitch, source.untyped_storage(), each, compute_crc32=True
        )
        found ^= crc
        assert first == bytes(source[each.source_offset :][: min(8, each.row_nbytes * each.num_rows)].tolist())
    for each in left:
        packed = bytearray(each.row_nbytes * each.num_rows)
        crc, _ = copy_strip(memoryview(packed), 0, each.row_nbytes, source.untyped_storage(), each, compute_crc32=True)
        found ^= crc
        for i, (place, _) in enumerate(places(each)):
            file[place] = packed[i]
    assert file == record
    # A CRC of zeros is that of their number alone: what the strips add is what is not zero.
    assert found == zlib.crc32(record) ^ zlib.crc32(bytes(len(record))) ^ _of_zeros(strip, taken + left, len(record))


def _of_zeros(strip, pieces, nbytes):
    """What the same pieces add where all their bytes are zero."""
    zeros = torch.zeros(strip.row_nbytes * strip.num_rows, dtype=torch.uint8).untyped_storage()
    found = 0
    for each in pieces:
        packed = bytearray(each.row_nbytes * each.num_rows)
        found ^= copy_strip(memoryview(packed), 0, each.row_nbytes, zeros, each, compute_crc32=True)[0]
    return found


def test_position_of_an_element():
    tensor = torch.arange(5 * 6 * 7).reshape(5, 6, 7)
    shard = tensor[1:4, 2:6, 3:5]
    for element, expected in enumerate(shard.reshape(-1).tolist()):
        assert position_of(tensor.shape, (1, 2, 3), shard.shape, element) == expected


# --- the object


def tensors(seed=0):
    torch.manual_seed(seed)
    return {
        "embedding": torch.randn(70, 50),
        "norm": torch.randn(7),
        "none": torch.empty(0, 4),
        "up": torch.randn(64, 40).bfloat16(),
        "scalar": torch.tensor(3),
        "down": torch.randn(40, 66),
        "cube": torch.randn(6, 8, 20),
        "signature": torch.frombuffer(bytearray(b"PK\x07\x08abcd" * 30), dtype=torch.uint8),
        "head": torch.randn(33, 31),
        "transposed": torch.randn(40, 60).t(),
    }


SHARDINGS = {
    "one rank": {},
    "two ranks, nearly all replicated": {"norm": (0, (0, 1))},
    "rows": {name: (0, (0, 1, 2)) for name in tensors() if name not in ("scalar", "none")},
    "columns": {name: (1, (0, 1, 2)) for name in ("embedding", "up", "down", "cube", "head", "transposed")},
    "innermost": {"cube": (2, (1, 0, 1, 2)), "head": (1, (2, 1, 0, 1)), "down": (0, (1, 1, 0))},
    "the other way round": {name: (0, (3, 2, 1, 0)) for name in ("embedding", "down", "up", "transposed")},
    "a rank without anything": {"embedding": (0, (0, 2)), "down": (0, (2, 0))},
}


@pytest.fixture
def written_by_torch(tmp_path):
    def write(state):
        torch.save({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}, path)
        return path.read_bytes()

    path = tmp_path / "model.pt"
    return write


@pytest.mark.parametrize("name", SHARDINGS)
@pytest.mark.parametrize("connections", [1, 3])
def test_it_is_the_file_of_one_rank(name, connections, monkeypatch, written_by_torch):
    store = threads.Store(monkeypatch)
    monkeypatch.setattr(own_parts, "_WAITING_NBYTES", 0)
    state = tensors()
    shards = threads.cut_into_shards(state, SHARDINGS[name])
    results, shared = threads.save(store, state, shards, connections=connections)
    assert not [result for result in results if isinstance(result, BaseException)]
    assert len(shared._owners) > 10
    assert store.object == written_by_torch(state)
    assert store.num_aborted == 0 or store.parts is None
    sent = [sum(part.nbytes for part in result.parts) for result in results]
    assert sum(sent) == shared._cuts[-1]
    assert sum(result.nbytes for result in results) == sum(tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_ranks_of_different_pace_wait_for_each_other_without_end(slow, monkeypatch, written_by_torch):
    """With one buffer each: the first part that is missing always gets on."""
    store = threads.Store(monkeypatch)
    monkeypatch.setattr(own_parts, "_WAITING_NBYTES", 0)
    state = {f"t{i}": torch.randn(30, 11 + i) for i in range(20)}
    shards = threads.cut_into_shards(state, {name: (i % 2, (0, 1, 2)) for i, name in enumerate(state)})
    results, _ = threads.save(store, state, shards, connections=1, slow=slow)
    assert not [result for result in results if isinstance(result, BaseException)]
    assert store.object == written_by_torch(state)


def test_a_buffer_is_for_the_parts_that_come_first(monkeypatch):
    """Other parts wait, though there is one: who has bytes of the first part may be waiting for it to be sent."""
    store = threads.Store(monkeypatch)
    monkeypatch.setattr(own_parts, "_WAITING_NBYTES", 0)
    upload = threads.Upload(store, "begun", "coordinator")
    own = own_parts.OwnParts(upload, {4: 8, 7: 8}, {}, {}, connections=1)
    came = threading.Event()

    def come_too_early():
        own.buffer(7)[:] = b"7" * 8
        came.set()
        own.put(7, 8)

    thread = threading.Thread(target=come_too_early, daemon=True)
    thread.start()
    assert not came.wait(0.2)
    own.buffer(4)[:] = b"4" * 8
    own.put(4, 5)
    own.put(4, 3)
    assert [part.number for part in own.finish(lambda: None)] == [4, 7]
    thread.join()
    own.close()
    assert store.parts == {4: b"4" * 8, 7: b"7" * 8}


def test_without_checksums(monkeypatch, written_by_torch):
    torch.serialization.set_crc32_options(False)
    try:
        test_it_is_the_file_of_one_rank("columns", 2, monkeypatch, written_by_torch)
    finally:
        torch.serialization.set_crc32_options(True)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_whatever_the_shards(data):
    torch.manual_seed(1)
    state, cuts = {}, {}
    num_ranks = data.draw(st.integers(1, 4))
    for i in range(data.draw(st.integers(1, 6))):
        shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
        state[f"t{i}"] = torch.randint(0, 255, shape, dtype=data.draw(st.sampled_from([torch.uint8, torch.int64])))
        if data.draw(st.booleans()):
            dim = data.draw(st.integers(0, len(shape) - 1))
            ranks = data.draw(st.lists(st.integers(0, num_ranks - 1), min_size=1, max_size=min(shape[dim], 4)))
            cuts[f"t{i}"] = (dim, ranks)
    with pytest.MonkeyPatch.context() as monkeypatch:
        store = threads.Store(monkeypatch)
        results, _ = threads.save(store, state, threads.cut_into_shards(state, cuts))
        assert not [result for result in results if isinstance(result, BaseException)]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert torch.load(io.BytesIO(store.object)).keys() == state.keys()
    assert len(store.object) - len(buffer.getvalue()) < 64 * (len(state) + 4)
    loaded = torch.load(io.BytesIO(store.object))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


# --- failures


def test_a_rank_whose_part_is_refused_ends_all(monkeypatch):
    store = threads.Store(monkeypatch)
    state = {f"t{i}": torch.randn(30, 31) for i in range(20)}

    def refuse(rank, number):
        if rank == 1:
            raise PermissionError("not yours")

    store.fault = refuse
    shards = threads.cut_into_shards(state, {name: (1, (0, 1, 2)) for name in state})
    results, _ = threads.save(store, state, shards)
    assert "not yours" in str(results[1])
    for rank in (0, 2):
        assert isinstance(results[rank], ConnectionError) and "rank" in str(results[rank])
    assert store.object is None and store.parts is None


def test_a_rank_that_never_comes_is_an_error(monkeypatch):
    """Its listener is gone, as with its process. It sends no part, so that nobody has anything for it."""
    store = threads.Store(monkeypatch)
    state = {f"t{i}": torch.randn(30, 31) for i in range(6)}
    shards = threads.cut_into_shards(state, {name: (1, (0, 0, 0, 1)) for name in state})
    serve = threads.PartWriter.write

    def write(writer):
        if writer._parts.rank == 1:
            writer._listener.close()
            raise SystemExit
        return serve(writer)

    monkeypatch.setattr(threads.PartWriter, "write", write)
    results, _ = threads.save(store, state, shards)
    assert isinstance(results[0], ConnectionError)
    assert "rank 1" in str(results[0])


def test_who_does_not_know_the_token_is_not_listened_to(monkeypatch, written_by_torch):
    import socket

    store = threads.Store(monkeypatch)
    state = tensors()
    shards = threads.cut_into_shards(state, SHARDINGS["rows"])
    listen = threads.Listener.serve
    strangers = []

    def serve(listener, token, sink):
        for data in (bytes(16) + bytes(4) + b"\x01" + bytes(60), b"GET / HTTP/1.1\r\n\r\n"):
            strangers.append(socket.create_connection(listener.address))
            strangers[-1].sendall(data)
        listen(listener, token, sink)

    monkeypatch.setattr(threads.Listener, "serve", serve)
    results, _ = threads.save(store, state, shards)
    assert not [result for result in results if isinstance(result, BaseException)]
    assert store.object == written_by_torch(state) and len(strangers) == 6
    for stranger in strangers:
        stranger.close()


def test_progress_tells_what_the_store_has(monkeypatch):
    store = threads.Store(monkeypatch)
    state = tensors()
    shards = threads.cut_into_shards(state, SHARDINGS["rows"])
    told = [[] for _ in shards]
    results, _ = threads.save(store, state, shards, progress=lambda rank, *amounts: told[rank].append(amounts))
    for of_rank, result in zip(told, results, strict=True):
        total = sum(part.nbytes for part in result.parts)
        assert of_rank[-1] == (total, total)
        assert of_rank == sorted(of_rank) and len(set(of_rank)) == len(of_rank)
