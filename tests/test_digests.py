"""digest="sha256" of every save: the sum is that of the file, and what stands beside the file is never another's."""

import errno
import hashlib
import io
import os
import pathlib
import shutil
import signal
import subprocess

import pytest
import torch
from conftest import require_native, require_package
from faults.ways import options_for

import statedict_io as sio
from statedict_io.writing import sidecar

SMALL = {"weight": torch.arange(1000.0), "step": 3}
LARGE = {"a": torch.arange(5_000_001, dtype=torch.int32), "b": torch.ones(9 << 20, dtype=torch.uint8), "c": 7}
WAYS = ["native", "torch", "legacy", "stock"]


def sha256_of(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def checks_out(path):
    """Whether ``sha256sum -c`` says so of the sidecar; where there is no such program, what it would say."""
    beside = pathlib.Path(f"{path}.sha256")
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--check", "--strict", "--quiet", "--", beside.name]
        return subprocess.run(command, cwd=beside.parent, capture_output=True).returncode == 0
    return beside.read_text() == f"{sha256_of(path)}  {path.name}\n"


@pytest.fixture(params=WAYS)
def options(request):
    if request.param == "native":
        require_native()
    with options_for(request.param) as options:
        yield options


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("state", [SMALL, LARGE], ids=["small", "large"])
def test_of_a_file(state, durable, options, tmp_path):
    path = tmp_path / "model.pt"
    for _ in range(2):
        found = sio.save(state, path, durable=durable, digest="sha256", **options)
        assert found == sha256_of(path) and checks_out(path)
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "model.pt.sha256"]
    assert sio.fastsave(state, path, digest="sha256", durable=durable, **options) == sha256_of(path)


def test_in_place(options, tmp_path):
    path = tmp_path / "model.pt"
    for _ in range(2):
        assert sio.save(LARGE, path, atomic=False, digest="sha256", **options) == sha256_of(path)
        assert checks_out(path)


@pytest.mark.parametrize("snapshot_nbytes", [None, 0], ids=["snapshot", "in the call"])
def test_of_an_asynchronous_save(snapshot_nbytes, options, tmp_path):
    path = tmp_path / "model.pt"
    pending = sio.save_async(LARGE, path, digest="sha256", max_snapshot_nbytes=snapshot_nbytes, **options)
    assert pending.result() is None
    assert pending.digest == sha256_of(path) and checks_out(path)
    unasked = sio.save_async(SMALL, tmp_path / "b.pt", **options)
    unasked.result()
    assert unasked.digest is None


def test_of_a_failed_asynchronous_save(backend, tmp_path):
    (tmp_path / "model.pt.sha256").mkdir()
    pending = sio.save_async(SMALL, tmp_path / "model.pt", digest="sha256", backend=backend)
    assert isinstance(pending.exception(), OSError)
    assert pending.digest is None and not (tmp_path / "model.pt").exists()


def test_of_holes(backend, tmp_path):
    path = tmp_path / "model.pt"
    with torch.serialization.skip_data():
        assert sio.save(LARGE, path, digest="sha256", backend=backend) == sha256_of(path)


@pytest.mark.parametrize("max_shard_nbytes", [None, 10**9])
def test_of_safetensors(max_shard_nbytes, backend, tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {name: LARGE[name] for name in "ab"}
    found = sio.save_safetensors(tensors, path, digest="sha256", backend=backend, max_shard_nbytes=max_shard_nbytes)
    assert found == (sha256_of(path) if max_shard_nbytes is None else {path.name: sha256_of(path)})
    assert checks_out(path)


def test_of_shards(backend, tmp_path):
    state = {name: torch.ones(1000) for name in "abc"}
    index = tmp_path / "model.safetensors.index.json"
    for nbytes, files in ((4000, 4), (8000, 3), (10**6, 1), (8000, 3)):
        found = sio.save_safetensors(state, tmp_path, digest="sha256", backend=backend, max_shard_nbytes=nbytes)
        assert found == {name: sha256_of(tmp_path / name) for name in found} and len(found) == files
        assert checks_out(index if files > 1 else tmp_path / "model.safetensors")
        assert len(os.listdir(tmp_path)) == files + 1
    sio.save_safetensors(state, tmp_path, backend=backend, max_shard_nbytes=4000)
    assert not [name for name in os.listdir(tmp_path) if name.endswith("sha256")]


def test_where_there_is_no_place_for_a_sidecar(options, tmp_path):
    buffer = io.BytesIO()
    found = sio.save(LARGE, buffer, digest="sha256", **options)
    assert found == hashlib.sha256(buffer.getvalue()).hexdigest()
    os.mkfifo(tmp_path / "fifo")
    with subprocess.Popen(["sha256sum", tmp_path / "fifo"], stdout=subprocess.PIPE, text=True) as reader:
        assert sio.save(LARGE, tmp_path / "fifo", digest="sha256", **options) == reader.stdout.read().split()[0]
    assert os.listdir(tmp_path) == ["fifo"]


def test_at_a_url(options):
    require_package("fsspec")
    import fsspec

    url = "memory://digests/model.pt"
    for _ in range(2):
        found = sio.save(LARGE, url, digest="sha256", **options)
        with fsspec.open(url) as file:
            assert hashlib.sha256(file.read()).hexdigest() == found
        with fsspec.open(f"{url}.sha256", "r") as file:
            assert file.read() == f"{found}  model.pt\n"


@pytest.mark.parametrize("name", ["a b.pt", "back\\slash.pt", "new\nline.pt", "é.pt", "-x.pt", "*.pt"])
def test_names(name, backend, tmp_path):
    sio.save(SMALL, tmp_path / name, digest="sha256", backend=backend)
    assert checks_out(tmp_path / name)


def test_the_target_of_a_link(backend, tmp_path):
    (tmp_path / "link.pt").symlink_to("model.pt")
    sio.save(SMALL, tmp_path / "link.pt", digest="sha256", backend=backend)
    assert checks_out(tmp_path / "model.pt")


@pytest.mark.parametrize("digest", ["md5", "", True])
def test_a_wrong_digest_is_named(digest, tmp_path):
    for save in (sio.save, sio.save_async, sio.save_safetensors):
        with pytest.raises(ValueError, match="digest must be 'sha256'"):
            save({"x": torch.ones(1)}, tmp_path / "x", digest=digest)
    assert os.listdir(tmp_path) == []


def test_an_old_sidecar_that_stays_keeps_the_old_file(backend, tmp_path):
    """It would not fit the new one."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    (tmp_path / "model.pt.sha256").mkdir()
    with pytest.raises(OSError, match=r"model\.pt\.sha256") as caught:
        sio.save(SMALL, path, digest="sha256", backend=backend)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["model.pt", "model.pt.sha256"]


def test_a_sidecar_that_cannot_be_written_is_an_error(backend, tmp_path, monkeypatch):
    def fail(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "model.pt"
    sio.save({"old": 1}, path, digest="sha256", backend=backend)
    monkeypatch.setattr(sidecar, "write_all", fail)
    with pytest.raises(OSError) as caught:
        sio.save(SMALL, path, digest="sha256", backend=backend)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == f"{path}.sha256"
    assert torch.load(path)["step"] == 3 and os.listdir(tmp_path) == ["model.pt"]


def test_a_later_call_in_between_keeps_its_sum(backend, tmp_path, monkeypatch):
    """A signal handler saves between the commit of a file and that of its sum."""
    path = tmp_path / "model.pt"
    write, inner, signals = sidecar.Sidecar.write, [], [signal.SIGUSR1]

    def handler(*_):
        inner.append(sio.save({"inner": 1}, path, digest="sha256", backend=backend))

    def write_late(self, *arguments):
        if signals:
            signal.raise_signal(signals.pop())
        write(self, *arguments)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        monkeypatch.setattr(sidecar.Sidecar, "write", write_late)
        sio.save(SMALL, path, digest="sha256", backend=backend)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert inner == [sha256_of(path)] and checks_out(path)


def test_no_errors_of_a_progress_callback_hang(backend, tmp_path):
    """Threads that wait for their turn to hash end with the save."""

    def fail(done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sio.save(LARGE, tmp_path / "model.pt", digest="sha256", backend=backend, progress=fail)
    assert os.listdir(tmp_path) == []
