"""``atomic=False``: the same bytes, into the file itself; what is lost is as documented, and no more."""

import gc
import io
import itertools
import os
import pathlib

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import require_native
from faults.ways import OPTIONS, options_for

import statedict_io as sio
from statedict_io.conversion import convert
from statedict_io.dcp import SingleFileWriter

OBJ = {"weight": torch.arange(1000, dtype=torch.int32), "step": 3}
LARGE = {"weight": torch.arange(3 << 20, dtype=torch.int32), "step": 3}


def save_async(obj, path, **options):
    sio.save_async(obj, path, **options).result(timeout=300)


def patched_save(obj, path, **options):
    with sio.patch_torch(**options):
        torch.save(obj, path)


def dcp_save(obj, path, **options):
    dcp.save({"weight": obj["weight"]}, storage_writer=SingleFileWriter(path, **options), no_dist=True)


def convert_to(obj, path, backend, **options):
    source = pathlib.Path(path).with_name("source.pt")
    torch.save({"weight": obj["weight"]}, source)
    convert(str(source), str(source.with_suffix(".safetensors")))
    convert(str(source.with_suffix(".safetensors")), str(path), **options)
    source.unlink(), source.with_suffix(".safetensors").unlink()


ENTRY_POINTS = {
    "save": sio.save,
    "fastsave": sio.fastsave,
    "save_async": save_async,
    "patch_torch": patched_save,
    "SingleFileWriter": dcp_save,
    "convert": convert_to,
}
every_entry_point = pytest.mark.parametrize("write", ENTRY_POINTS.values(), ids=list(ENTRY_POINTS))


@pytest.fixture(params=list(OPTIONS))
def options(request):
    if request.param == "native":
        require_native()
    with options_for(request.param) as options:
        yield options


@pytest.mark.parametrize("durable", [True, False])
def test_the_bytes_of_torch_save(durable, options, tmp_path):
    """Also where the file was longer before."""
    path, names = tmp_path / "model.pt", sorted(["model.pt", "expected"])
    torch_options = {key: value for key, value in options.items() if key != "backend"}
    for obj in (LARGE, OBJ):
        torch.save(obj, path, **torch_options)
        path.rename(tmp_path / "expected")
        for before in (None, b"old" * 10_000_000):
            path.unlink(missing_ok=True)
            if before is not None:
                path.write_bytes(before)
            sio.save(obj, path, durable=durable, atomic=False, **options)
            assert path.read_bytes() == (tmp_path / "expected").read_bytes()
            assert sorted(os.listdir(tmp_path)) == names


@every_entry_point
def test_it_is_the_same_file(write, backend, tmp_path):
    """Number, mode, owner and all its names; a new one is made as any other."""
    path, link, hard = tmp_path / "in" / "model.pt", tmp_path / "link.pt", tmp_path / "hard.pt"
    path.parent.mkdir()
    path.write_bytes(b"old"), path.chmod(0o604)
    os.link(path, hard)
    link.symlink_to(path)
    before = path.stat()
    write(OBJ, link, backend=backend, atomic=False)
    after = path.stat()
    assert (after.st_ino, after.st_mode, after.st_uid) == (before.st_ino, before.st_mode, before.st_uid)
    assert link.is_symlink() and torch.equal(torch.load(hard)["weight"], OBJ["weight"])
    torch.save(OBJ, path.with_name("by torch"))
    write(OBJ, path.with_name("new.pt"), backend=backend, atomic=False)
    assert path.with_name("new.pt").stat().st_mode == path.with_name("by torch").stat().st_mode
    assert sorted(os.listdir(path.parent)) == ["by torch", "model.pt", "new.pt"]


@every_entry_point
@pytest.mark.parametrize("through", ["itself", "a hard link"])
def test_a_file_that_this_process_has_mapped_is_refused(through, write, backend, tmp_path):
    """Its pages would be gone: whoever reads the tensors is killed by SIGBUS."""
    path, other = tmp_path / "model.pt", tmp_path / "other.pt"
    torch.save(LARGE, path)
    os.link(path, other)
    old = path.read_bytes()
    mapped = torch.load(path if through == "itself" else other, mmap=True)
    with pytest.raises(BaseException, match=r"mapped into memory .*clone the tensors"):
        write(mapped, path, backend=backend, atomic=False)
    assert path.read_bytes() == old
    copied = {"weight": mapped.pop("weight").clone(), "step": 3}
    gc.collect()  # DCP's frames
    write(copied, path, backend=backend, atomic=False)
    assert torch.equal(torch.load(path)["weight"], LARGE["weight"])


class Planned(Exception):
    """This test's own."""


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("save", [sio.save, save_async])
def test_a_save_that_fails_in_the_middle(save, exists, backend, tmp_path):
    """The old file is lost, its name is not; a new one vanishes. Descriptors are given back; the next save works."""
    path = tmp_path / "model.pt"

    def fail(done, total):
        if done > 0:
            raise Planned

    save(LARGE, tmp_path / "model.pt", backend=backend, atomic=False)
    path.unlink()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        if exists:
            path.write_bytes(b"old")
        with pytest.raises(Planned):
            save(LARGE, path, backend=backend, progress=fail, atomic=False)
        assert os.listdir(tmp_path) == ["model.pt"] * exists
        assert not exists or not path.read_bytes().startswith(b"old")
    assert len(os.listdir("/proc/self/fd")) == before
    save(OBJ, path, backend=backend, atomic=False)
    assert torch.equal(torch.load(path)["weight"], OBJ["weight"])


@pytest.mark.parametrize("write", [sio.save, sio.fastsave, save_async, patched_save])
def test_what_cannot_be_pickled_leaves_the_file_alone(write, backend, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    with pytest.raises(AttributeError, match="pickle"):
        write({**OBJ, "function": lambda: 0}, path, backend=backend, atomic=False)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize(("outer", "inner"), itertools.product([True, False], repeat=2))
def test_a_save_inside_a_save_of_one_file(outer, inner, backend, tmp_path):
    """The later call stands, as ever; but into a file that is being written in place no other is written."""
    path, inner_error, begun = tmp_path / "model.pt", [], []

    def save_too(done, total):
        if not begun:
            begun.append(True)
            try:
                sio.save(OBJ, path, backend=backend, atomic=inner)
            except OSError as e:
                inner_error.append(e)

    sio.save(LARGE, path, backend=backend, atomic=outer, progress=save_too)
    assert begun
    if not outer and not inner:
        assert "another save of this process is writing" in str(inner_error[0])
        assert inner_error[0].filename == str(path)
    stands = LARGE if inner_error else OBJ
    assert len(inner_error) == (not outer and not inner)
    assert torch.equal(torch.load(path)["weight"], stands["weight"])
    assert os.listdir(tmp_path) == ["model.pt"]


def test_saves_in_the_background_go_one_after_the_other(backend, tmp_path):
    path = tmp_path / "model.pt"
    for atomic in itertools.product([True, False], repeat=3):
        pending = [
            sio.save_async({"weight": torch.full((1 << 18,), i)}, path, backend=backend, atomic=each, max_in_flight=4)
            for i, each in enumerate(atomic)
        ]
        sio.save({"weight": torch.full((9,), 9)}, path, backend=backend, atomic=False)
        assert [save.exception(timeout=300) for save in pending] == [None] * 3
        assert torch.equal(torch.load(path)["weight"], torch.full((9,), 9))


def test_what_is_no_file_is_written_as_ever(backend, tmp_path):
    buffers = [io.BytesIO(), io.BytesIO()]
    for buffer, atomic in zip(buffers, (True, False), strict=True):
        sio.save(OBJ, buffer, backend=backend, atomic=atomic)
    assert buffers[0].getvalue() == buffers[1].getvalue()
    sio.save(OBJ, "/dev/null", backend=backend, atomic=False)
