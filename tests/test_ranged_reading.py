"""The reader of ranges against the reader of files, on a source that counts: what is read, how often, by how many."""

import io
import itertools
import threading
import zipfile

import pytest
import torch
from corpus import CORPUS
from corpus_case import filled, random_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

import statedict_io as sio
from statedict_io.archive.record_rows import RowsOfRecord
from statedict_io.backends.file_pieces import Piece, reads_of
from statedict_io.backends.python_reading import PythonOpenArchive, storage_memory
from statedict_io.backends.ranged_reading import RangedOpenArchive
from statedict_io.reading.object_source import ObjectSource
from statedict_io.system.scattered import Scatter

KIB = 1 << 10


class Ranges:
    """Bytes, as a store would give them."""

    num_connections = 3

    def __init__(self, data, max_read_nbytes=80 * KIB):
        self.data, self.nbytes, self.max_read_nbytes = data, len(data), max_read_nbytes
        self.requests = []

    def read_into(self, destination, offset):
        self.requests.append((offset, offset + len(destination)))
        destination[:] = self.data[offset : offset + len(destination)]

    def keep(self, spans):
        """As if nothing could be kept."""

    def read_ranges(self, reads, tick=None):
        for read in reads:
            if read.end > self.nbytes:
                raise EOFError
        buffers = [read.begin() for read in reads]
        for read, memory in zip(reads, buffers, strict=True):
            self.requests.append((read.offset, read.end))
            assert sum(map(len, memory)) == read.nbytes <= self.max_read_nbytes
            Scatter(memory).write(self.data[read.offset : read.end])
            read.finish(memory)
        if tick is not None:
            tick(sum(read.counted_nbytes for read in reads))


def saved(obj):
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def zipped_again(data, *, junk=False, compress=()):
    """The same records by another writer.

    Args:
        junk: bytes between the records that no record has, as where one was deleted.
        compress: names of records.
    """
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        for number, name in enumerate(old.namelist()):
            method = zipfile.ZIP_DEFLATED if name.rpartition("/")[2] in compress else zipfile.ZIP_STORED
            new.writestr(name, old.read(name), method)
            if junk:
                new.writestr(f"junk{number}", b"x" * (10 + number))
                new.NameToInfo.pop(f"junk{number}")
                new.filelist.pop()
    return target.getvalue()


STATE = {"a": filled(40 * KIB), "few": filled(3), "b": filled(100, 7), "empty": torch.empty(0), "c": filled(9 * KIB)}
FILES = {
    "torch": saved(STATE),
    "zip": zipped_again(saved(STATE)),
    "zip with bytes between": zipped_again(saved(STATE), junk=True),
    "partly compressed": zipped_again(saved(STATE), compress=("0", "2")),
    **{name: saved(CORPUS[name]()) for name in ("module_state_dict", "shared_storages") if name in CORPUS},
}


def both(name, **options):
    data = FILES[name]
    source = Ranges(data, **options)
    archive = RangedOpenArchive(source, "there")
    source.requests.clear()
    return archive, PythonOpenArchive(ObjectSource(io.BytesIO(data)), "here"), source


def bytes_of(storages):
    return [bytes(storage_memory(storage)) for storage in storages]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verify", [False, True])
def test_storages_and_checksums(name, verify):
    there, here, _ = both(name)
    records = [*range(len(here.records))]
    ticks = []
    for subset in (records, records[::2][::-1], records[-1:], []):
        found = there.load_storages(subset, verify=verify, progress=lambda *tick: ticks.append(tick))
        assert bytes_of(found) == bytes_of(here.load_storages(subset, verify=verify, progress=None))
        assert there.checksums(subset, progress=None) == here.checksums(subset, progress=None)
    assert [there.payload_offset(r) for r in records] == [here.payload_offset(r) for r in records]
    assert all(done <= total for done, total in ticks)


@pytest.mark.parametrize("name", FILES)
def test_rows(name):
    there, here, _ = both(name)
    for record, entry in enumerate(here.records):
        if entry.compressed or entry.nbytes < 64:
            continue
        whole = bytes_of(here.load_storages([record], verify=False, progress=None))[0]
        a, b = bytearray(21), bytearray(12)
        there, _, _ = both(name)
        there.read_rows(
            [RowsOfRecord(record, 3, memoryview(a), 3, 19), RowsOfRecord(record, entry.nbytes - 12, memoryview(b))]
        )
        assert a == b"".join(whole[at : at + 7] for at in (3, 22, 41)) and b == whole[-12:]
        with pytest.raises(ValueError, match="no range"):
            there.read_rows([RowsOfRecord(record, entry.nbytes - 11, memoryview(b))])


def test_what_torch_has_written_is_read_once():
    there, _, source = both("torch", max_read_nbytes=40 * KIB)
    there.load_storages([*range(len(there.records))], verify=True, progress=None)
    requests = sorted(source.requests)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(requests))
    sizes = {end - start for start, end in requests}
    assert len(requests) == 6 and max(sizes) - min(sizes) < 10  # twice three connections
    source.requests.clear()
    for record in range(len(there.records)):
        there.payload_offset(record)
    assert source.requests == []


def test_headers_that_are_asked_for_one_after_the_other_are_read_together():
    data = saved([random_bytes(300 * KIB + number) for number in range(40)])
    source = Ranges(data, 1 << 30)
    archive = RangedOpenArchive(source, "there")
    offsets = []
    for record in range(len(archive.records)):
        before = len(source.requests)
        archive.payload_offset(record)
        offsets.append(len(source.requests) - before)
    assert sum(offsets) <= len(archive.records) and sum(each > 0 for each in offsets) <= 7


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 90)), max_size=12),
    st.integers(0, 60),
    st.integers(1, 50),
    st.integers(1, 5),
)
def test_pieces_arrive_where_they_belong(wanted, max_gap_nbytes, max_read_nbytes, num_connections):
    """Also those that overlap."""
    data = bytes(torch.arange(400).to(torch.uint8).tolist())
    memories = [bytearray(nbytes) for _, nbytes in wanted]
    seen = {}
    lock = threading.Lock()

    def note(record, position, found):
        with lock:
            seen[record, position] = bytes(found)

    pieces = []
    for number, ((offset, nbytes), memory) in enumerate(zip(wanted, memories, strict=True)):
        pieces.append(Piece(offset, nbytes, memoryview(memory) if number % 2 else None, number))
    reads = reads_of(
        pieces, max_gap_nbytes=max_gap_nbytes, max_read_nbytes=max_read_nbytes, num_connections=num_connections,
        seen=note,
    )  # fmt: skip
    Ranges(data, max_read_nbytes).read_ranges(reads)
    for number, ((offset, nbytes), memory) in enumerate(zip(wanted, memories, strict=True)):
        if number % 2:
            assert memory == data[offset : offset + nbytes]
        parts = sorted((position, part) for (record, position), part in seen.items() if record == number)
        assert b"".join(part for _, part in parts) == data[offset : offset + nbytes]
    assert sum(read.counted_nbytes for read in reads) == sum(nbytes for _, nbytes in wanted)


def test_damage_is_named():
    data = bytearray(FILES["torch"])
    archive = PythonOpenArchive(ObjectSource(io.BytesIO(bytes(data))), "here")
    record = next(r for r, entry in enumerate(archive.records) if entry.name == "data/0")
    data[archive.records[record].header_offset + 31] ^= 1
    there = RangedOpenArchive(Ranges(bytes(data)), "there")
    for action in (
        lambda: there.load_storages([record], verify=False, progress=None),
        lambda: there.checksums([record], progress=None),
        lambda: there.payload_offset(record),
        lambda: there.read_range(record, 5, memoryview(bytearray(5))),
    ):
        with pytest.raises(sio.CorruptCheckpointError, match=r"there.*another name"):
            action()


def test_a_wrong_checksum_names_the_record():
    data = bytearray(FILES["torch"])
    archive = PythonOpenArchive(ObjectSource(io.BytesIO(bytes(data))), "here")
    record = next(r for r, entry in enumerate(archive.records) if entry.name == "data/0")
    data[archive.payload_offset(record) + 100] ^= 1
    there = RangedOpenArchive(Ranges(bytes(data)), "there")
    with pytest.raises(sio.CorruptCheckpointError) as caught:
        there.load_storages([*range(len(there.records))], verify=True, progress=None)
    assert caught.value.records == ("data/0",)
