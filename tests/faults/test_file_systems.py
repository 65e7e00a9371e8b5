"""The same promises on real file systems of every kind that this kernel has: see file_systems.py."""

import errno
import json
import os
import pathlib

import pytest
import torch

import statedict_io as sio
from faults.crash_process import Checkpoints
from faults.file_systems import NAMES, each, made, make_image, mounted, mounted_image
from faults.preload import run_module
from faults.test_fault_injection import require

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")

SMALL = {"weight": torch.arange(1000, dtype=torch.int32)}
LARGE = {"weight": torch.arange(3 << 20, dtype=torch.int32), "bias": torch.arange(5)}  # direct, where that is taken


@pytest.fixture(params=each(*NAMES))
def place(request, tmp_path):
    with made(request.param, tmp_path) as directory:
        yield directory


def names_in(directory):
    return sorted(set(os.listdir(directory)) - {"lost+found"})


@pytest.mark.parametrize("durable", [True, False])
def test_saves_fresh_and_over_an_old_file(durable, backend, place, tmp_path):
    (tmp_path / "ref").mkdir()
    path, reference = place / "model.pt", tmp_path / "ref" / "model.pt"
    for obj in (SMALL, LARGE, LARGE, SMALL):
        sio.save(obj, path, backend=backend, durable=durable)
        torch.save(obj, reference)
        assert path.read_bytes() == reference.read_bytes()
        assert names_in(place) == ["model.pt"]


def test_over_the_file_that_the_tensors_are_mapped_from(backend, place):
    path = place / "model.pt"
    sio.save(LARGE, path, backend=backend)
    mapped = torch.load(path, mmap=True)
    before = path.read_bytes()
    sio.save(mapped, path, backend=backend)
    assert path.read_bytes() == before
    assert torch.equal(mapped["weight"], LARGE["weight"])
    del mapped


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_full_one(zipped, durable, backend, place):
    """Full of old checkpoints: the next one does not fit, by much or by a little, and a small one still does."""
    path, options = place / "model.pt", {"backend": backend, "_use_new_zipfile_serialization": zipped}
    sio.save(SMALL, path, **options)
    before = path.read_bytes()
    usage = os.statvfs(place)
    free = usage.f_bavail * usage.f_frsize
    with open(place / "filler", "wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, max(0, free - (6 << 20)))
    for obj in (LARGE, {"weight": torch.zeros(1 << 30, dtype=torch.uint8)}):
        with pytest.raises(OSError) as caught:
            sio.save(obj, str(path), durable=durable, **options)
        assert caught.value.filename == str(path)
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert path.read_bytes() == before
        assert names_in(place) == ["filler", "model.pt"]
    (place / "filler").unlink()
    sio.save(LARGE, path, durable=durable, **options)
    assert torch.equal(torch.load(path)["weight"], LARGE["weight"])
    assert names_in(place) == ["model.pt"]


@pytest.mark.parametrize("way", ["native", "torch", "legacy"])
@pytest.mark.parametrize("name", each("ext4", "ext4 data=journal", "xfs", "btrfs"))
def test_a_power_cut_at_every_call(name, way, preload, tmp_path, report_counts):
    """What the disk holds when the saver dies, with nothing synced since, is mounted: the old file or the new one."""
    require(way)
    image, copies = tmp_path / "image", tmp_path / "copies"
    copies.mkdir()
    make_image(name, image)
    with mounted_image(name, image, tmp_path / "mount") as directory:
        cuts = json.loads(run_module(preload, "power_cut_process", directory, image, copies, way))
    new = 0
    for copy, allowed in cuts:
        with mounted_image(name, copies / copy, tmp_path / "after") as directory:
            found = Checkpoints(directory, way).generation()
            assert found in allowed, f"cut {copy}: {found}, not of {allowed}"
            new += found == allowed[-1]
        pathlib.Path(copies, copy).unlink()
    report_counts(f"{name}, {way}: {len(cuts)} cuts, 0 without the old or the new file")
    assert len(cuts) > 40 and 1 < new < len(cuts)


def test_a_power_cut_loses_what_is_not_durable(preload, tmp_path):
    """The copy of the disk can tell: without the fsyncs a save that has returned is gone."""
    image = tmp_path / "image"
    make_image("ext4", image)
    with mounted_image("ext4", image, tmp_path / "mount") as directory:
        sio.save(SMALL, directory / "durable.pt")
        sio.save(SMALL, directory / "lost.pt", durable=False)
        (tmp_path / "copy").write_bytes(image.read_bytes())
    with mounted_image("ext4", tmp_path / "copy", tmp_path / "after") as directory:
        assert names_in(directory) == ["durable.pt"]
        assert torch.equal(torch.load(directory / "durable.pt")["weight"], SMALL["weight"])


def test_a_read_only_one(backend, tmp_path):
    with mounted("tmpfs", tmp_path / "mount", "ro") as directory:
        with pytest.raises(OSError) as caught:
            sio.save(SMALL, str(directory / "model.pt"), backend=backend)
        assert (caught.value.errno, caught.value.filename) == (errno.EROFS, str(directory / "model.pt"))
