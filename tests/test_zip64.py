"""Past 4 GiB and past 65,535 records. The short tests write sparse files; the long ones write the gigabytes."""

import shutil
import subprocess
import zipfile

import pytest
import torch
from corpus_case import filled, random_bytes
from oracle import assert_same_bytes, names_in, two_directories

import statedict_io as sio

BOUNDARY = 1 << 32
GIB = 1 << 30


def numbered_bytes(nbytes):
    """`nbytes` of random data, cheaply: blocks of 64 MiB that all differ."""
    block = random_bytes(1 << 26).view(torch.int64)
    data = torch.empty(nbytes, dtype=torch.uint8)
    for i, piece in enumerate(data.split(1 << 26)):
        piece.copy_((block + i).view(torch.uint8)[: piece.numel()])
    return data


def ends(path, nbytes=1 << 16):
    with open(path, "rb") as file:
        head = file.read(nbytes)
        file.seek(-nbytes, 2)
        return path.stat().st_size, head, file.read()


def sparse_layout(path, sizes, save):
    """Head, tail and size of a file whose records hold no data; the memory of `sizes` is never touched."""
    with torch.serialization.skip_data():
        save([torch.empty(size, dtype=torch.uint8) for size in sizes], path)
    try:
        return ends(path)
    finally:
        path.unlink()


@pytest.mark.parametrize("size", [BOUNDARY - 2, BOUNDARY - 1, BOUNDARY, BOUNDARY + 5])
def test_a_record_around_4_gib_followed_by_small_ones_has_torchs_layout(size, backend, tmp_path):
    ref, ours = (directory / "model.pt" for directory in two_directories(tmp_path))
    sizes = [100_000, size, 1, 100_000]
    expected = sparse_layout(ref, sizes, torch.save)
    assert sparse_layout(ours, sizes, lambda obj, f: sio.save(obj, f, backend=backend)) == expected


@pytest.mark.parametrize("offset", [BOUNDARY - 1 - 64, BOUNDARY - 2, BOUNDARY - 1, BOUNDARY, BOUNDARY + 1])
def test_a_record_whose_header_starts_around_4_gib_has_torchs_layout(offset, backend, tmp_path):
    ref, ours = (directory / "model.pt" for directory in two_directories(tmp_path))
    base = 3 * GIB  # no record is over 4 GiB itself
    with torch.serialization.skip_data():
        torch.save(
            [
                torch.empty(base, dtype=torch.uint8),
                torch.empty(64, dtype=torch.uint8),
                torch.empty(9, dtype=torch.uint8),
            ],
            ref,
        )
    with zipfile.ZipFile(ref) as archive:
        start = archive.getinfo("model/data/2").header_offset
    sizes = [base, 64 + offset - start, 9]
    expected = sparse_layout(ref, sizes, torch.save)
    assert sparse_layout(ours, sizes, lambda obj, f: sio.save(obj, f, backend=backend)) == expected


def unzip_test(path):
    if shutil.which("unzip"):
        done = subprocess.run(["unzip", "-tqq", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def assert_same_large_file(tmp_path, obj, backend, unzips=True):
    ref, ours = (directory / "model.pt" for directory in two_directories(tmp_path))
    try:
        torch.save(obj, ref)
        sio.save(obj, ours, backend=backend)
        assert_same_bytes(ref, ours)
        ref.unlink()
        assert names_in(ours.parent) == ["model.pt"]
        if unzips:
            unzip_test(ours)
        return torch.load(ours, mmap=True)["last"]
    finally:
        ref.unlink(missing_ok=True)
        ours.unlink(missing_ok=True)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [BOUNDARY - 1, BOUNDARY + 5])
def test_a_tensor_over_4_gib_followed_by_small_ones(size, backend, tmp_path):
    obj = {"first": filled(3), "large": numbered_bytes(size), "small": filled(1000), "last": filled(7, seed=1)}
    # torch's own file with a record of exactly 2^32 - 1 bytes, a size that also means "see zip64", does not pass unzip.
    last = assert_same_large_file(tmp_path, obj, backend, unzips=size != BOUNDARY - 1)
    assert torch.equal(last.view(torch.int32), obj["last"].view(torch.int32))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_records_that_start_past_4_gib(backend, tmp_path):
    data = numbered_bytes(900 << 20)
    obj = {f"{i}": data.clone().add_(i) for i in range(5)} | {"last": filled(7)}
    del data
    assert torch.equal(assert_same_large_file(tmp_path, obj, backend).view(torch.int32), obj["last"].view(torch.int32))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_over_2_gib_into_an_unbuffered_file(backend, tmp_path):
    """The system takes at most 2 GiB less a page at one write."""
    ref, ours = (directory / "f" for directory in two_directories(tmp_path))
    obj = {"large": numbered_bytes(2 * GIB + 12_345), "last": filled(9)}
    with open(ref, "wb") as file:
        torch.save(obj, file)
    with open(ours, "wb", buffering=0) as file:
        sio.save(obj, file, backend=backend)
    assert_same_bytes(ref, ours)
    ref.unlink(), ours.unlink()


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [65_528, 65_529, 65_530, 70_000])
def test_more_records_than_a_zip_directory_counts(count, backend, tmp_path):
    obj = [torch.tensor([i + 1]) for i in range(count)]
    ref, ours = (directory / "model.pt" for directory in two_directories(tmp_path))
    torch.save(obj, ref)
    sio.save(obj, ours, backend=backend)
    assert_same_bytes(ref, ours)
    unzip_test(ours)
    assert torch.load(ours)[-1].item() == count
