"""The same in stores: without links and locks."""

import errno

import pytest
import torch
from remote.conftest import BUCKET, keys, s3, s3_session  # noqa: F401
from remote.s3_server import error

import statedict_io as sio

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(params=["memory", "s3"])
def store(request):
    """(URL of a folder that is not there, names in it)"""
    if request.param == "s3":
        server = request.getfixturevalue("s3")
        yield f"s3://{BUCKET}/run 7", lambda: [key.rpartition("/")[2] for key in keys(server)]
        return
    fs = fsspec.filesystem("memory")
    yield "memory://runs/7", lambda: sorted(path.rpartition("/")[2] for path in fs.find("/runs/7"))
    for name in fs.find("/runs"):
        fs.rm_file(name)


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_run_in_a_store(store, way, backend, state):
    url, names = store
    ckpts = sio.CheckpointDirectory(url, keep_last=2, keep_best=1, best="min")
    assert ckpts.latest() is ckpts.best() is ckpts.restore() is None
    for step, metric in enumerate([0.5, 0.1, 0.4, 0.3, 0.2], start=1):
        if way == "sync":
            ckpts.save(state(step), step, metric, backend=backend)
        else:
            ckpts.save_async(state(step), step, metric, backend=backend).result()
        ckpts.wait()
    kept = [f"step-{step:08d}.pt" for step in (2, 4, 5)]
    assert names() == sorted([*kept, *(name + ".json" for name in kept)])
    again = sio.CheckpointDirectory(url, best="min")
    found = again.latest(backend=backend)
    assert (found.step, found.metric, found.path) == (5, 0.2, f"{url}/step-00000005.pt")
    assert found.load()["step"] == 5 and again.best().step == 2 and again.restore(backend=backend) == 5
    assert [each.nbytes > 0 and each.saved_at > 0 for each in again] == [True] * 3
    ckpts.protect(2)
    ckpts.save(state(6), 6, 0.0)
    ckpts.save({"again": True}, 6, 0.05, digest="sha256")
    ckpts.wait()
    assert [(each.step, each.metric, each.protected) for each in ckpts] == [
        (2, 0.1, True), (5, 0.2, False), (6, 0.05, False)]  # fmt: skip
    assert len(ckpts.latest().sha256) == 64


def test_a_digest_is_compared(store, state):
    url, _ = store
    ckpts = sio.CheckpointDirectory(url)
    for step in (1, 2):
        ckpts.save(state(step), step, digest="sha256")
    assert ckpts.latest(verify="digest").step == 2
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{path}/step-00000002.pt", fs.cat_file(f"{path}/step-00000001.pt"))
    assert sio.CheckpointDirectory(url).latest().step == 2
    with pytest.warns(sio.CheckpointDirectoryWarning, match="not the bytes that were saved"):
        assert ckpts.latest(verify="digest").step == 1


def test_a_password_is_not_shown(state):
    url = "memory://user:secret@host/run"
    fs = fsspec.filesystem("memory")
    ckpts = sio.CheckpointDirectory(url)
    ckpts.save(state(1), 1)
    ckpts.save(state(2), 2)
    (second,) = [path for path in fs.find("") if path.endswith("step-00000002.pt")]
    fs.pipe_file(second, b"")
    with pytest.warns(sio.CheckpointDirectoryWarning) as warned:
        found = ckpts.latest()
    shown = [repr(ckpts), ckpts.path, repr(found), *(str(each.message) for each in warned)]
    shown += [text for each in found.skipped for text in (each.path, each.reason)]
    fs.rm_file(second.replace("2.pt", "1.pt"))
    with pytest.raises(FileNotFoundError) as raised:
        found.nbytes  # noqa: B018
    shown.append(str(raised.value))
    assert not any("secret" in text for text in shown) and all("host/run" in text for text in shown)
    for name in fs.find(""):
        fs.rm_file(name)


def test_damaged_objects_are_passed_over(store, state):
    url, _ = store
    ckpts = sio.CheckpointDirectory(url)
    for step in (1, 2, 3, 4):
        ckpts.save(state(step), step)
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{path}/step-00000004.pt", b"")
    fs.pipe_file(f"{path}/step-00000003.pt", fs.cat_file(f"{path}/step-00000003.pt")[:-10])
    data = bytearray(fs.cat_file(f"{path}/step-00000002.pt"))
    data[data.index(b"\x02" * 100) + 50] ^= 1
    fs.pipe_file(f"{path}/step-00000002.pt", bytes(data))
    with pytest.warns(sio.CheckpointDirectoryWarning, match="3 checkpoints are passed over, step 1 is taken"):
        found = ckpts.latest()
    assert found.step == 1 and [each.step for each in found.skipped] == [4, 3, 2]
    with pytest.warns(sio.CheckpointDirectoryWarning):
        assert ckpts.latest(verify="structure").step == 2


def test_a_store_that_does_not_answer_is_no_empty_one(s3, state):  # noqa: F811
    ckpts = sio.CheckpointDirectory(f"s3://{BUCKET}/run")
    ckpts.save(state(1), 1)
    s3.fail(lambda request: request.method in ("GET", "HEAD"), error(403, "AccessDenied"))
    with pytest.raises(OSError) as raised:
        sio.CheckpointDirectory(f"s3://{BUCKET}/run").latest()
    assert raised.value.errno == errno.EACCES
    s3.reset()
    s3.fail(lambda request: request.kind in ("put", "part", "create"), error(500, "InternalError"))
    with pytest.raises(OSError):
        ckpts.save(state(2), 2)
    s3.reset()
    assert ckpts.latest().step == 1


def test_what_stores_cannot_do(store):
    with pytest.raises(ValueError, match="links"):
        sio.CheckpointDirectory(store[0], links=True)


def test_a_url_of_a_file_system_is_a_path(tmp_path, state):
    ckpts = sio.CheckpointDirectory(f"file://{tmp_path}/runs", links=True)
    ckpts.save(state(1), 1)
    assert torch.load(tmp_path / "runs" / "latest")["step"] == 1
