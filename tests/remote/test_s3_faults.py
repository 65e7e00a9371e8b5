"""Whatever fails: an OSError that names the URL, the old object whole, no upload left behind."""

import errno
import time

import fsspec
import fsspec.config
import pytest
from corpus_case import filled, random_bytes

import statedict_io as sio
from remote.conftest import BUCKET, content, keys, uploads
from remote.s3_server import cut_short, drop, error

MIB = 1 << 20
KEY = "model.pt"
URL = f"s3://{BUCKET}/{KEY}"


pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.fixture(scope="module")
def state():
    """Of three parts."""
    return {"w": random_bytes(160 << 10), "few": filled(5)}


@pytest.fixture(scope="module")
def large():
    return {"w": random_bytes(12 * MIB), "few": filled(5)}


@pytest.fixture(autouse=True)
def fail_soon(monkeypatch):
    """s3fs repeats what may have been bad luck, after longer and longer waits."""
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)


def is_part(number):
    return lambda request: request.part == number


def is_kind(kind):
    return lambda request: request.kind == kind


FAULTS = {
    "a part is refused": (is_part(2), error(400, "BadDigest"), errno.EIO),
    "the server fails in a part": (is_part(3), error(500, "InternalError"), errno.EREMOTEIO),
    "the first part is forbidden": (is_part(1), error(403, "AccessDenied"), errno.EACCES),
    "the connection drops in a part": (is_part(2), drop, None),
    "the connection drops in the last part": (is_part(3), drop, None),
    "the upload may not begin": (is_kind("create"), error(403, "AccessDenied"), errno.EACCES),
    "the bucket is gone": (is_kind("create"), error(404, "NoSuchBucket"), errno.ENOENT),
    "the end is refused": (is_kind("complete"), error(400, "InvalidPart"), errno.EIO),
}


@pytest.mark.parametrize("old", [False, True], ids=["no old object", "an old object"])
@pytest.mark.parametrize("name", FAULTS)
def test_no_object_and_no_upload_is_left(name, old, s3, state, backend):
    predicate, fault, number = FAULTS[name]
    if old:
        sio.save({"old": 1}, URL)
    before = content(s3, KEY) if old else None
    s3.reset()
    s3.fail(predicate, fault)
    with pytest.raises(OSError) as caught:
        sio.save(state, URL, backend=backend)
    assert caught.value.filename == URL and URL in str(caught.value)
    assert number is None or caught.value.errno in (number, errno.EINVAL), repr(caught.value)
    assert any(predicate(request) for request in s3.requests)
    s3.faults.clear()
    assert keys(s3) == ([KEY] if old else []) and uploads(s3) == []
    assert not old or content(s3, KEY) == before
    sio.save(state, URL, backend=backend)  # nothing stands in the way
    assert sio.verify(URL).ok


def test_a_fault_that_passes_is_no_error(s3, state, backend):
    s3.fail(is_part(2), drop, times=1)
    sio.save(state, URL, backend=backend)
    assert sio.verify(URL).ok and uploads(s3) == []


@pytest.mark.parametrize("action", ["save", "load", "open_checkpoint", "verify"])
def test_wrong_credentials(action, s3, state, monkeypatch):
    sio.save({"old": 1}, URL)
    monkeypatch.setitem(fsspec.config.conf, "s3", {**fsspec.config.conf["s3"], "key": "another"})
    arguments = (state, URL) if action == "save" else (URL,)
    with pytest.raises(PermissionError) as caught:
        getattr(sio, action)(*arguments)
    assert caught.value.filename == URL and caught.value.errno == errno.EACCES
    assert "Access Key" in str(caught.value) or action != "save"
    assert keys(s3) == [KEY] and uploads(s3) == []


def test_an_upload_that_cannot_be_aborted_is_told(s3, state):
    s3.fail(is_part(2), error(400, "BadDigest", "the first of them"))
    s3.fail(is_kind("abort"), error(403, "AccessDenied", "no aborting here"))
    with pytest.raises(OSError, match=r"the first of them.*could not be discarded.*no aborting here"):
        sio.save(state, URL)
    assert keys(s3) == []


@pytest.mark.parametrize("action", ["load", "open_checkpoint", "verify"])
def test_a_missing_object(action, s3):
    with pytest.raises(FileNotFoundError) as caught:
        getattr(sio, action)(f"s3://{BUCKET}/missing.pt")
    assert caught.value.filename == f"s3://{BUCKET}/missing.pt" and caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("fault", [error(500, "InternalError"), drop, cut_short(100 << 10)])
def test_a_range_that_fails(fault, s3, large):
    sio.save(large, URL)
    s3.fail(lambda request: request.kind == "get" and request.range[0] > 4 * MIB, fault)
    for action in (sio.load, lambda url: sio.open_checkpoint(url)["w"], sio.verify):
        with pytest.raises(OSError) as caught:
            action(URL)
        assert caught.value.filename == URL


def test_what_cannot_be_pickled_reaches_no_server(s3):
    with pytest.raises(Exception, match="pickle"):
        sio.save({"f": lambda: 1}, URL)
    assert s3.requests == []


def test_an_interrupted_save_leaves_nothing(s3, state, backend):
    def interrupt(done, total):
        if done > 64 << 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sio.save(state, URL, backend=backend, progress=interrupt)
    assert keys(s3) == [] and uploads(s3) == []


def test_a_failed_upload_is_not_finished_by_the_collector(s3, state):
    import gc

    s3.fail(is_part(2), error(400, "BadDigest"))
    with pytest.raises(OSError):
        sio.save(state, URL)
    s3.faults.clear()
    gc.collect()
    time.sleep(0.1)
    assert keys(s3) == [] and uploads(s3) == []
    assert "complete" not in s3.kinds() and "put" not in s3.kinds()


def test_a_failed_async_save_says_so(s3, state, backend):
    s3.fail(is_part(2), error(400, "BadDigest"))
    pending = sio.save_async(state, URL, backend=backend)
    with pytest.raises(OSError) as caught:
        pending.result()
    assert caught.value.filename == URL
    assert keys(s3) == [] and uploads(s3) == []
