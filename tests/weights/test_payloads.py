"""Payloads at known places of a file, without headers: what the readers of both backends make of them."""

import os

import pytest
import torch
from corpus_case import random_bytes

import statedict_io as sio
from statedict_io import backends
from statedict_io.archive.payload_ranges import PayloadRange, RangeEntries

MIB = 1 << 20


def opened(path, ranges, backend):
    fd = os.open(path, os.O_RDONLY)
    try:
        entries = RangeEntries([PayloadRange(*each) for each in ranges], [f"p{i}" for i in range(len(ranges))])
        yield backends.for_reading(backend).open_payloads(fd, str(path), entries)
    finally:
        os.close(fd)


@pytest.fixture
def content(tmp_path):
    data = random_bytes(40 * MIB).numpy().tobytes()
    (tmp_path / "file").write_bytes(data)
    return data


RANGES = {
    "in file order": [(10, 5, 1), (15, 9 * MIB, 1), (15 + 9 * MIB, 3, 1), (20 * MIB, 20 * MIB, 4)],
    "in any order": [
        (30 * MIB, MIB, 8),
        (0, 1, 1),
        (1, 12 * MIB, 1),
        (29 * MIB + 7, 100_000, 1),
        (16 * MIB, 8 * MIB, 8),
    ],
    "empty ones": [(0, 0, 1), (0, 7, 1), (7, 0, 4), (7, 0, 8), (7, MIB, 1), (40 * MIB, 0, 8)],
    "many small": [(17 * i, 17, 1) for i in range(3000)],
    "none": [],
    "not aligned": [(1, 9 * MIB, 16), (9 * MIB + 1, 70_000, 8), (9 * MIB + 70_001, 8 * MIB, 4)],
}


@pytest.mark.parametrize("what", RANGES)
def test_all_at_once_and_in_part(what, content, backend, tmp_path):
    ranges = RANGES[what]
    for reader in opened(tmp_path / "file", ranges, backend):
        for order in (range(len(ranges)), reversed(range(len(ranges)))):
            records = list(order)
            storages = reader.load_storages(records, verify=False, progress=None)
            for record, storage in zip(records, storages, strict=True):
                offset, nbytes, alignment = ranges[record]
                tensor = torch.empty(0, dtype=torch.uint8).set_(storage)
                assert tensor.numpy().tobytes() == content[offset : offset + nbytes]
                assert tensor.data_ptr() % alignment == 0 and not storage.resizable()
        for record, (offset, nbytes, _) in enumerate(ranges[:20]):
            assert reader.payload_offset(record) == offset and reader.records[record].nbytes == nbytes
            part = bytearray(nbytes // 2)
            reader.read_range(record, nbytes // 4, memoryview(part))
            assert part == content[offset + nbytes // 4 :][: nbytes // 2]
            with pytest.raises(ValueError):
                reader.read_range(record, nbytes, memoryview(bytearray(1)))


def test_what_does_not_lie_in_the_file_is_refused(content, tmp_path):
    """By the extension, whoever asks for it; Python's callers have looked before."""
    from conftest import require_native

    require_native()
    for ranges in ([(0, 100, 1), (99, 1, 1)], [(0, 41 * MIB, 1)], [(41 * MIB, 0, 1)], [((1 << 64) - 8, 8, 1)]):
        with pytest.raises(sio.CorruptCheckpointError, match="file"):
            next(opened(tmp_path / "file", ranges, "native"))
