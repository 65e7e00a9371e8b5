"""``patch_torch``: the files that saves make then, in all the ways in which torch.save is called."""

import io
import os
import pathlib
import pickle
import shutil
import subprocess
import tempfile
import warnings

import pytest
import torch
from oracle import assert_same_bytes
from patched_saves import is_replaced_by, nothing_stays_patched, sample_state  # noqa: F401 - a fixture

import statedict_io as sio


@pytest.fixture
def state():
    return sample_state()


@pytest.mark.parametrize("number", ["EACCES", "EPERM", "EBUSY", "EXDEV", "EROFS"])
def test_a_file_that_can_be_written_but_not_replaced_is_written_in_place(tmp_path, state, monkeypatch, number):
    import errno

    replace = os.replace

    def refuse(source, target, **options):
        if str(source).endswith(".sdio-tmp"):
            raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)), source)
        replace(source, target, **options)

    monkeypatch.setattr(os, "replace", refuse)
    path = tmp_path / "a.pt"
    torch.save(state, tmp_path / "ref"), replace(tmp_path / "ref", path)
    torch.save(state, path)
    expected = path.read_bytes()
    with sio.patch_torch(), pytest.warns(RuntimeWarning, match=r"a\.pt' cannot be replaced .*in place") as caught:
        assert not is_replaced_by(torch.save, state, path)
    assert path.read_bytes() == expected and os.listdir(tmp_path) == ["a.pt"]
    assert caught[0].filename == is_replaced_by.__code__.co_filename  # who has called torch.save
    with pytest.raises(OSError):
        sio.save(state, path)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else or to mount")


@as_root
def test_a_file_in_a_directory_that_takes_no_others(state):
    """In a forked child, which is somebody else."""
    directory = pathlib.Path(tempfile.mkdtemp())
    path = directory / "a.pt"
    try:
        directory.chmod(0o755)
        path.write_bytes(b"old")
        os.chown(path, 65534, 65534)
        with sio.patch_torch():
            torch.save(state, io.BytesIO())  # imports what a child could not
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    os.setgroups([]), os.setgid(65534), os.setuid(65534)
                    with pytest.raises(PermissionError):
                        sio.save(state, path)
                    with pytest.warns(RuntimeWarning, match="cannot be replaced"):
                        torch.save(state, path)
                    with pytest.raises(RuntimeError, match="open file failed"):
                        torch.save(state, directory / "new.pt")
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
        assert torch.load(path)["step"] == 3 and os.listdir(directory) == ["a.pt"]
    finally:
        shutil.rmtree(directory)


@as_root
def test_a_file_that_is_a_mount_point(tmp_path, state):
    """As containers have them."""
    (tmp_path / "outside").write_bytes(b"old")
    path = tmp_path / "a.pt"
    path.write_bytes(b"")
    if subprocess.run(["mount", "--bind", tmp_path / "outside", path], capture_output=True).returncode != 0:
        pytest.skip("cannot mount here")
    try:
        with pytest.raises(OSError):
            sio.save(state, path)
        with sio.patch_torch(), pytest.warns(RuntimeWarning, match="cannot be replaced"):
            torch.save(state, path)
        assert torch.load(tmp_path / "outside")["step"] == 3
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_full_disk_is_no_reason_to_write_in_place(tmp_path, state, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with sio.patch_torch(), pytest.raises(OSError) as raised:
        torch.save(state, path)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.pt"]


def test_what_torch_refuses_is_refused_with_its_words(tmp_path, state):
    cases = [(state, tmp_path / "missing" / "a.pt"), (state, 5), (lambda: None, io.BytesIO()), (state, "")]
    for obj, f in cases:
        with pytest.raises(Exception) as reference:
            torch.save(obj, f)
        with sio.patch_torch(), pytest.raises(type(reference.value)) as ours:
            torch.save(obj, f)
        assert str(reference.value).split("\nException raised from")[0].split(". (")[0] in str(ours.value)


def test_torchs_own_calls(tmp_path):
    """Pickling a storage and DCP call torch.save themselves."""
    import torch.distributed.checkpoint as dcp

    tensor = torch.arange(10.0)

    def write(directory):
        directory.mkdir()
        torch.save({"storage": tensor.untyped_storage()}, directory / "storage.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (directory / "pickled").write_bytes(pickle.dumps(tensor.storage()))
            dcp.save({"w": tensor, "other": {1, 2}}, checkpoint_id=directory / "dcp", no_dist=True)
            loaded = pickle.loads((directory / "pickled").read_bytes())
        assert list(loaded) == list(tensor)

    write(tmp_path / "ref")
    with sio.patch_torch():
        write(tmp_path / "ours")
    for name in ("pickled", "storage.pt", "dcp/__0_0.distcp"):
        assert_same_bytes(tmp_path / "ref" / name, tmp_path / "ours" / name)


def test_compiled_code_saves_as_ever(tmp_path):
    """torch.compile leaves torch.save alone; what is below the patched one it would trace, and warn about."""

    def step(x, path):
        y = x * 2 + 1
        torch.save({"y": y, "tail": y[1:]}, path)
        return y.sum()

    def run(directory):
        directory.mkdir()
        torch._dynamo.reset()
        compiled = torch.compile(step, backend="eager")
        return [compiled(torch.arange(10.0) + number, directory / "a.pt").item() for number in range(2)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = run(tmp_path / "ref")
        with sio.patch_torch():
            assert run(tmp_path / "ours") == expected
    assert_same_bytes(tmp_path / "ref" / "a.pt", tmp_path / "ours" / "a.pt")


def test_file_objects_are_written_as_the_original_writes_them(tmp_path, state, backend):
    import gzip

    def write(directory, **options):
        directory.mkdir()
        with open(directory / "plain", "wb") as file:
            file.write(b"head")
            torch.save(state, file, **options)
            torch.save({"second": 2}, file, **options)
            file.write(b"tail")
        with open(directory / "raw", "wb", buffering=0) as file:
            torch.save(state, file, **options)
        with gzip.GzipFile(directory / "zipped.gz", "wb", mtime=0) as file:
            torch.save(state, file, **options)
        return [directory / name for name in ("plain", "raw")], gzip.open(directory / "zipped.gz").read()

    for number, options in enumerate(({}, {"_use_new_zipfile_serialization": False})):
        refs, unzipped = write(tmp_path / f"ref{number}", **options)
        with sio.patch_torch(backend=backend):
            ours, unzipped_ours = write(tmp_path / f"ours{number}", **options)
        for ref, our in zip(refs, ours, strict=True):
            assert_same_bytes(ref, our)
        assert unzipped == unzipped_ours
